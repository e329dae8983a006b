-- Roles are of the whole server: these are made on both sides, or on the source alone where `--roles` brings them.
CREATE ROLE objects_owner LOGIN;
CREATE ROLE objects_reader NOLOGIN;
CREATE ROLE "Objects Writer" NOLOGIN;
