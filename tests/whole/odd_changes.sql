INSERT INTO odd.wide (c1, c2, c3, c1597) SELECT :round * 100 + i, 'y', 3, true FROM generate_series(1, 5) i;
UPDATE odd.wide SET c1600 = c1600 + 1, c1599 = :round WHERE c1 % 2 = 0;
UPDATE odd.wide SET c1 = c1 + 100000 WHERE c1 = 3;
DELETE FROM odd.wide WHERE c1 = 10 + :round;
UPDATE odd.wide SET c4 = c1 WHERE c1 < 30000;
INSERT INTO odd.wide_full (c1, c2, c1599) SELECT i % 5, 'x', 7 FROM generate_series(1, 5) i;
UPDATE odd.wide_full SET c1600 = :round WHERE ctid = (SELECT max(ctid::text)::tid FROM odd.wide_full WHERE c1 = 1);
DELETE FROM odd.wide_full WHERE ctid = (SELECT max(ctid::text)::tid FROM odd.wide_full WHERE c1 = 2);

INSERT INTO odd.none DEFAULT VALUES;
INSERT INTO odd.none_full SELECT FROM generate_series(1, 3);
DELETE FROM odd.none_full WHERE ctid = (SELECT max(ctid::text)::tid FROM odd.none_full);

INSERT INTO odd.dropped (id, b, c) SELECT 1000 * :round + i, 'new', NULL FROM generate_series(1, 10) i;
UPDATE odd.dropped SET b = b || :round, added = DEFAULT WHERE id % 3 = 0;
UPDATE odd.dropped SET c = id WHERE id BETWEEN 10 AND 12;
DELETE FROM odd.dropped WHERE id = :round;
INSERT INTO odd.all_dropped DEFAULT VALUES;

BEGIN;
UPDATE odd.generated SET n = n + 1000 WHERE id % 4 = 0;
UPDATE odd.generated SET n = n - 999 WHERE n > 1000 AND NOT EXISTS (SELECT FROM odd.generated o WHERE o.n = odd.generated.n - 999);
INSERT INTO odd.generated (id, n) SELECT 100 * :round + i, 100000 * :round + i FROM generate_series(1, 5) i;
DELETE FROM odd.generated WHERE id = 20 + :round;
COMMIT;
UPDATE odd.generated_full SET n = n + 1 WHERE ctid IN (SELECT min(ctid::text)::tid FROM odd.generated_full GROUP BY n);
DELETE FROM odd.generated_full WHERE ctid = (SELECT max(ctid::text)::tid FROM odd.generated_full WHERE n = 3);
INSERT INTO odd.generated_full (n, t) VALUES (3, NULL), (3, NULL);
INSERT INTO odd.only_generated DEFAULT VALUES;

INSERT INTO odd.always (t) VALUES ('new'), ('newer');
UPDATE odd.always SET t = t || '.' WHERE id % 3 = 0;
UPDATE odd.always SET id = DEFAULT WHERE id = (SELECT min(id) FROM odd.always);
DELETE FROM odd.always WHERE id = (SELECT max(id) FROM odd.always);
INSERT INTO odd.by_default (t) VALUES ('new'), ('newer');
UPDATE odd.by_default SET id = -id WHERE id % 7 = :round;
INSERT INTO odd.beside (id, t) SELECT 100 * :round + i, 'new' FROM generate_series(1, 4) i;
UPDATE odd.beside SET n = DEFAULT, t = t || '.' WHERE id % 5 = :round;

BEGIN;
-- Places that change hands.
UPDATE odd.exclusion SET room = -room WHERE room = 1;
UPDATE odd.exclusion SET during = int4range(lower(during) + 10, upper(during) + 10) WHERE room = -1;
UPDATE odd.exclusion SET room = 1 WHERE room = -1;
DELETE FROM odd.exclusion WHERE id = :round;
INSERT INTO odd.exclusion SELECT 1000 * :round + id, room, int4range(lower(during) + 10000 * :round, upper(during) + 10000 * :round) FROM odd.exclusion WHERE id BETWEEN 20 AND 25;
COMMIT;
BEGIN; UPDATE odd.deferrable SET place = 51 - place WHERE place BETWEEN 1 AND 50; INSERT INTO odd.deferrable VALUES (:round + 100, :round + 100); COMMIT;
UPDATE odd.deferrable_key SET id = 21 - id WHERE id BETWEEN 1 AND 20;
DELETE FROM odd.deferrable_key WHERE id = 1 OR id = 20;
BEGIN; DELETE FROM odd.nulls WHERE a IS NULL; UPDATE odd.nulls SET a = NULL, b = NULL WHERE id = 10 + :round; INSERT INTO odd.nulls VALUES (100 + :round, :round, 'new'); COMMIT;
BEGIN; UPDATE odd.partial SET current = false WHERE owner = 2; UPDATE odd.partial SET current = true WHERE id = 7 + 5 * (:round % 2); COMMIT;

INSERT INTO odd.tree SELECT 100 * :round + i, :round + 5, 'new' FROM generate_series(1, 5) i;
UPDATE odd.tree SET id = id + 10000 WHERE id = 4 + :round;
DELETE FROM odd.tree WHERE id = 20 - :round;
BEGIN; INSERT INTO odd.egg VALUES (100 + :round, 200 + :round); INSERT INTO odd.hen VALUES (200 + :round, 100 + :round); COMMIT;
DELETE FROM odd.egg WHERE id = :round;
INSERT INTO odd.not_valid VALUES (100 + :round, 5, 60);
UPDATE odd.not_valid SET n = 1 WHERE id = :round;
UPDATE odd.not_valid SET id = id + 1000 WHERE id = 15 + :round;

INSERT INTO odd.ruled VALUES (100 + :round, 'new');
UPDATE odd.ruled SET t = t || :round WHERE id % 4 = 0;
DELETE FROM odd.ruled WHERE id IN (:round, 10 + :round);
INSERT INTO odd.triggered VALUES (100 + :round, 'new');
UPDATE odd.triggered SET t = t || :round WHERE id % 4 = 0;
DELETE FROM odd.triggered WHERE id = 10 + :round;
INSERT INTO odd.replica VALUES (100 + :round, 'new');
UPDATE odd.replica SET t = t || :round WHERE id % 4 = 0;
DELETE FROM odd.replica WHERE id = 10 + :round;
-- One of a batch that is refused, and replayed row by row.
BEGIN; DELETE FROM odd.replica WHERE id = 19; INSERT INTO odd.replica VALUES (19, 'again'); UPDATE odd.replica SET id = 500 WHERE id = 18; UPDATE odd.replica SET id = 18 WHERE id = 19; UPDATE odd.replica SET id = 19 WHERE id = 500; COMMIT;
INSERT INTO odd.cache (parent, t) SELECT i, 'new' FROM generate_series(1, 5) i;
UPDATE odd.cache SET t = t || :round WHERE id % 4 = 0;
INSERT INTO odd.cache_line SELECT i, 'new' FROM generate_series(1, 20) i;
DELETE FROM odd.cache_line WHERE cache % 7 = :round;
DELETE FROM odd.cache WHERE id > 200 AND id % 3 = :round;
INSERT INTO odd.cache_parted SELECT 100 * :round + i, (ARRAY['a', 'b'])[1 + i % 2] FROM generate_series(1, 20) i;
INSERT INTO odd.hidden VALUES (100 + :round, 'new');
UPDATE odd.hidden SET t = t || :round WHERE id % 4 = 0;
DELETE FROM odd.hidden WHERE id = 10 + :round;

UPDATE odd.stored SET id = id + 1000 WHERE id = :round;
UPDATE odd.stored SET main = main || :round WHERE id % 5 = 0;
UPDATE odd.stored SET wide = NULL, plain = 'short' WHERE id % 7 = :round;
INSERT INTO odd.stored SELECT id + 10000 * :round, plain, lz4, wide, main FROM odd.stored WHERE id BETWEEN 20 AND 25;
UPDATE odd.stored_full SET n = n + 1 WHERE n % 3 = 0;
DELETE FROM odd.stored_full WHERE n = 7;
UPDATE odd.stored_full SET main = 'short' WHERE n = 8;
INSERT INTO odd.typed (id) VALUES (100 + :round);
UPDATE odd.typed SET t = t || :round WHERE id < 5;
UPDATE odd.of_rows SET r.b = 'changed', rs = rs || ROW(:round, NULL)::odd.typed WHERE id % 2 = 0;
INSERT INTO odd.of_rows SELECT id + 100 * :round, r, rs FROM odd.of_rows WHERE id < 5;
