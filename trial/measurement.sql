\set device random(1, 10)
INSERT INTO measurement VALUES (clock_timestamp(), :device, random()) ON CONFLICT DO NOTHING;
