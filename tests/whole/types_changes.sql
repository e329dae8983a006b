-- Every kind of change of every type, in one round after another.
SET search_path = ext;
DO $$
DECLARE
    r integer := :round;
    t record;
    the_array text;
BEGIN
    FOR t IN SELECT *, to_regclass(format('typed.%I', 'value_' || name)) AS in_values FROM typed.kind ORDER BY name LOOP
        the_array := CASE WHEN EXISTS (SELECT FROM pg_attribute WHERE attrelid = t.in_values AND attname = 'a') THEN ', a' ELSE '' END;
        -- New rows, other values, values that go and come.
        EXECUTE format('INSERT INTO typed.%1$I (v%2$s) SELECT v%2$s FROM typed.%1$I WHERE id < 100', 'value_' || t.name, the_array);
        EXECUTE format('UPDATE typed.%1$I x SET v = (SELECT v FROM typed.%1$I y WHERE y.id > x.id ORDER BY y.id LIMIT 1) WHERE id %% 3 = %2$s', 'value_' || t.name, r % 3);
        IF the_array <> '' THEN
            EXECUTE format('UPDATE typed.%1$I SET a = a || v WHERE id %% 4 = %2$s AND coalesce(cardinality(a), 0) < 10 AND array_ndims(a) IS NOT DISTINCT FROM 1', 'value_' || t.name, r % 4);
            EXECUTE format('UPDATE typed.%1$I SET a = NULL WHERE id %% 7 = %2$s', 'value_' || t.name, r % 7);
        END IF;
        EXECUTE format('UPDATE typed.%1$I SET id = id + 1000000 WHERE id %% 5 = %2$s AND id < 1000000', 'value_' || t.name, r % 5);
        EXECUTE format('DELETE FROM typed.%1$I WHERE id %% 6 = %2$s AND id > 20', 'value_' || t.name, r % 6);
        -- Of equal rows, one changes and one goes.
        EXECUTE format('INSERT INTO typed.%I SELECT v, %s FROM typed.%I WHERE id < 100', 'full_' || t.name, r, 'value_' || t.name);
        EXECUTE format('UPDATE typed.%1$I SET n = 100 + %2$s WHERE ctid IN (SELECT min(ctid::text)::tid FROM typed.%1$I WHERE n < 100 GROUP BY v::text)', 'full_' || t.name, r);
        EXECUTE format('UPDATE typed.%1$I SET v = (SELECT v FROM typed.%3$I WHERE id = 1) WHERE ctid IN (SELECT max(ctid::text)::tid FROM typed.%1$I WHERE n <= %2$s GROUP BY v::text)', 'full_' || t.name, r, 'value_' || t.name);
        EXECUTE format('DELETE FROM typed.%1$I WHERE ctid IN (SELECT min(ctid::text)::tid FROM typed.%1$I GROUP BY v::text, n HAVING count(*) > 1)', 'full_' || t.name);
        IF t.has_key THEN
            EXECUTE format('DELETE FROM typed.%1$I WHERE n %% 3 = %2$s', 'key_' || t.name, r % 3);
            EXECUTE format('UPDATE typed.%1$I SET n = n + 1', 'key_' || t.name);
            EXECUTE format('INSERT INTO typed.%I SELECT v, id FROM typed.%I WHERE v IS NOT NULL ON CONFLICT DO NOTHING', 'key_' || t.name, 'value_' || t.name);
            -- A key that becomes another.
            EXECUTE format('WITH gone AS (SELECT k FROM typed.%1$I ORDER BY k DESC LIMIT 1) DELETE FROM typed.%1$I WHERE k = (SELECT k FROM gone)', 'key_' || t.name);
        END IF;
    END LOOP;
END $$;
DO $$
DECLARE
    t record;
BEGIN
    FOR t IN SELECT * FROM typed.kind WHERE has_key ORDER BY name LOOP
        EXECUTE format('UPDATE typed.%1$I SET k = coalesce((SELECT v FROM typed.%2$I v WHERE v IS NOT NULL AND NOT EXISTS (SELECT FROM typed.%1$I o WHERE o.k = v.v) LIMIT 1), k), n = n - 1 '
            'WHERE k = (SELECT k FROM typed.%1$I ORDER BY k LIMIT 1)', 'key_' || t.name, 'value_' || t.name);
    END LOOP;
END $$;
-- Keys that are equal and not the same.
BEGIN;
UPDATE typed.key_numeric SET k = CASE WHEN k = 1.1 THEN ('1.1' || repeat('0', :round))::numeric ELSE k END, n = n + 1;
UPDATE typed.key_nocase SET k = CASE :round % 2 WHEN 0 THEN upper(k) ELSE lower(k) END;
UPDATE typed.key_float8 SET k = -k WHERE k = 0;
UPDATE typed.key_interval SET k = CASE :round % 2 WHEN 0 THEN interval '24:00' ELSE interval '1 day' END WHERE k = interval '1 day';
UPDATE typed.key_jsonb SET k = CASE :round % 2 WHEN 0 THEN '1.0' ELSE '1.00' END::jsonb WHERE k = '1';
COMMIT;
INSERT INTO typed.weak SELECT :round * 10 + id, v FROM typed.weak WHERE id < 10;
UPDATE typed.weak SET v = v + 1;
