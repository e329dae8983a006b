INSERT INTO parted.sale (region, at, amount) SELECT (ARRAY['north', 'east', 'south', 'west'])[1 + i % 4], date '2022-06-01' + i * 30, i + 1000 * :round FROM generate_series(1, 60) i;
-- Rows that move: within a level, to another level, to the default partition and back, and between orders of columns.
UPDATE parted.sale SET region = 'south' WHERE id % 5 = :round;
UPDATE parted.sale SET region = 'north', amount = amount + 0.5 WHERE id % 11 = :round;
UPDATE parted.sale SET at = at + 365 WHERE id % 7 = :round;
UPDATE parted.sale SET at = at - 800 WHERE id % 13 = :round;
UPDATE parted.sale SET at = at + 800 WHERE id % 13 = :round;
BEGIN; UPDATE parted.sale SET id = id + 100000, at = at + 400 WHERE id % 17 = :round; UPDATE parted.sale SET at = at - 400 WHERE id > 100000; COMMIT;
DELETE FROM parted.sale WHERE id % 19 = :round;
UPDATE parted.sale_2025 SET amount = -amount WHERE id % 3 = 0;

INSERT INTO parted.log SELECT i, (ARRAY['full', 'key', 'inserts'])[1 + i % 3], 'line ' || :round FROM generate_series(100 * :round, 100 * :round + 20) i;
UPDATE parted.log SET kind = 'inserts' WHERE kind = 'full' AND n % 4 = 0;
UPDATE parted.log SET kind = 'full' WHERE kind = 'key' AND n % 5 = 0;
UPDATE parted.log SET line = line || '.', n = -n WHERE kind IN ('full', 'key') AND n % 7 = 0;
DELETE FROM parted.log WHERE kind IN ('full', 'key') AND n % 9 = 0;

UPDATE parted.place SET id = id + 100 WHERE id = 40 + :round AND NOT EXISTS (SELECT FROM parted.place o WHERE o.id = 140 + :round);
DELETE FROM parted.place WHERE id = 50 + :round;
UPDATE parted.place SET id = 1000 + :round WHERE id = 60 + :round;
INSERT INTO parted.visit SELECT timestamptz '2018-01-01 00:00+00' + i * interval '80 days', 70 + i, i FROM generate_series(1, 20) i;
UPDATE parted.visit SET at = at + interval '3 years' WHERE place % 6 = :round;
DELETE FROM parted.visit WHERE place = 80 + :round;

INSERT INTO parted.car (name) VALUES ('new');
UPDATE parted.thing SET name = name || '.' WHERE id % 3 = 0;
UPDATE parted.car SET wheels = wheels + 1;
UPDATE ONLY parted.thing SET id = id + 5000 WHERE id = :round;
DELETE FROM parted.thing WHERE id % 29 = :round;
UPDATE parted.priced SET price = price + 1 WHERE price = 1 AND id = 1;
DELETE FROM parted.truck WHERE id = 110 + :round;
INSERT INTO parted.boat (id, name) VALUES (300 + :round, NULL);
-- All of a tree at once, and one level of it.
BEGIN; TRUNCATE parted.sale_2024; INSERT INTO parted.sale (region, at, amount) SELECT 'south', date '2024-02-02', i FROM generate_series(1, 20) i; COMMIT;
TRUNCATE ONLY parted.priced;
INSERT INTO parted.priced (price, id) SELECT i % 3, 1 FROM generate_series(1, 10) i;
