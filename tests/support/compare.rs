//! Two databases compared by plain SQL, and what a migration leaves on a server.

use std::collections::BTreeMap;

use tokio_postgres::Client;

const OUR_SCHEMAS: &str = "n.nspname NOT LIKE 'pg\\_%' AND n.nspname NOT IN ('information_schema', 'walferry') \
     AND n.nspname NOT LIKE 'walferry\\_ddl\\_%'";

/// Of every table: how many rows, and a hash over the ordered hashes of all rows as text.
pub async fn rows(client: &Client) -> BTreeMap<String, (i64, Option<String>)> {
    rows_with(client, 3).await
}

/// The same with so many digits of floats: versions agree on what 0 makes of them.
pub async fn rows_with(client: &Client, extra_float_digits: i32) -> BTreeMap<String, (i64, Option<String>)> {
    let settings = format!(
        "SET work_mem = '256MB'; SET TimeZone = 'UTC'; SET extra_float_digits = {extra_float_digits}; SET search_path = ''"
    );
    client.batch_execute(&settings).await.unwrap();
    let tables = client
        .query(
            &format!(
                "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind IN ('r', 'm') AND {OUR_SCHEMAS} ORDER BY 1"
            ),
            &[],
        )
        .await
        .unwrap();
    let mut rows = BTreeMap::new();
    for table in tables {
        let table: String = table.get(0);
        let query = format!(
            "SELECT count(*), md5(string_agg(h, '' ORDER BY h)) \
             FROM (SELECT md5(t::text) COLLATE \"C\" FROM ONLY {table} t) hashes(h)"
        );
        let row = client.query_one(&query, &[]).await.unwrap_or_else(|error| panic!("{query}: {error:?}"));
        rows.insert(table, (row.get(0), row.get(1)));
    }
    rows
}

/// Of every sequence: its last value, and whether it was handed out.
pub async fn sequences(client: &Client) -> BTreeMap<String, (i64, bool)> {
    let sequences = client
        .query(
            &format!(
                "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind = 'S' AND {OUR_SCHEMAS}"
            ),
            &[],
        )
        .await
        .unwrap();
    let mut values = BTreeMap::new();
    for sequence in sequences {
        let sequence: String = sequence.get(0);
        let row = client.query_one(&format!("SELECT last_value, is_called FROM {sequence}"), &[]).await.unwrap();
        values.insert(sequence, (row.get(0), row.get(1)));
    }
    values
}

/// Everything of the schema that must have come over, one line per object.
pub async fn definitions(client: &Client) -> Vec<String> {
    client.batch_execute("SET search_path = ''").await.unwrap();
    let query = format!(
        "WITH ours AS (SELECT c.oid, n.nspname, c.relname, c.relkind FROM pg_class c \
                       JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {OUR_SCHEMAS}) \
         SELECT format('relation %I.%I %s', nspname, relname, relkind) FROM ours \
         UNION ALL SELECT format('column %I.%I %I %s %s %s %s %s', nspname, relname, attname, format_type(atttypid, atttypmod), \
                 attnotnull, attidentity, attgenerated, pg_get_expr(adbin, adrelid)) \
             FROM ours JOIN pg_attribute a ON a.attrelid = ours.oid AND attnum > 0 AND NOT attisdropped \
             LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum WHERE relkind <> 'i' \
         UNION ALL SELECT format('constraint %I.%I %s %s', nspname, relname, pg_get_constraintdef(k.oid), convalidated) \
             FROM ours JOIN pg_constraint k ON k.conrelid = ours.oid \
         UNION ALL SELECT format('index %s %s %s', pg_get_indexdef(i.indexrelid), indisvalid, indisreplident) \
             FROM ours JOIN pg_index i ON i.indrelid = ours.oid \
         UNION ALL SELECT format('trigger %s %s', pg_get_triggerdef(t.oid), tgenabled) \
             FROM ours JOIN pg_trigger t ON t.tgrelid = ours.oid AND NOT tgisinternal \
         UNION ALL SELECT format('view %I.%I %s', nspname, relname, pg_get_viewdef(oid)) FROM ours WHERE relkind IN ('v', 'm') \
         UNION ALL SELECT format('replica identity %I.%I %s', nspname, ours.relname, c.relreplident) \
             FROM ours JOIN pg_class c USING (oid) WHERE ours.relkind IN ('r', 'p') \
         UNION ALL SELECT format('function %s', pg_get_functiondef(p.oid)) FROM pg_proc p \
             JOIN pg_namespace n ON n.oid = p.pronamespace WHERE {OUR_SCHEMAS} AND prokind IN ('f', 'p') \
         UNION ALL SELECT format('type %I.%I %s %s', n.nspname, typname, typtype, \
                 (SELECT string_agg(enumlabel, ',' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid)) \
             FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE {OUR_SCHEMAS} \
         ORDER BY 1"
    );
    client.query(&query, &[]).await.unwrap().into_iter().map(|row| row.get(0)).collect()
}

/// What a migration could have changed on a server besides the rows, one line per object: the same before and after a
/// refusal.
pub async fn touched(client: &Client) -> Vec<String> {
    let mut objects = definitions(client).await;
    let query = "SELECT format('schema %s', nspname) FROM pg_namespace WHERE nspname NOT LIKE 'pg\\_t%' \
         UNION ALL SELECT format('slot %s', slot_name) FROM pg_replication_slots \
         UNION ALL SELECT format('publication %s', pubname) FROM pg_publication \
         UNION ALL SELECT format('setting %s %s %s', setdatabase, setrole, setconfig) FROM pg_db_role_setting \
         UNION ALL SELECT format('role %s', rolname) FROM pg_roles \
         UNION ALL SELECT format('event trigger %s', evtname) FROM pg_event_trigger \
         UNION ALL SELECT format('file of %s %s', oid, pg_relation_filenode(oid)) FROM pg_class WHERE relnamespace = 'public'::regnamespace \
         ORDER BY 1";
    objects.extend(client.query(query, &[]).await.unwrap().into_iter().map(|row| row.get::<_, String>(0)));
    objects
}

/// What of walferry is on a server.
pub async fn left_over(client: &Client, side: &str) -> Vec<String> {
    let query = "SELECT format('slot %s', slot_name) FROM pg_replication_slots \
         UNION ALL SELECT format('publication %s', pubname) FROM pg_publication \
         UNION ALL SELECT format('schema %s', nspname) FROM pg_namespace WHERE nspname = 'walferry' OR nspname LIKE 'walferry\\_%' \
         UNION ALL SELECT format('setting %s', setconfig) FROM pg_db_role_setting \
         UNION ALL SELECT format('event trigger %s', evtname) FROM pg_event_trigger \
         UNION ALL SELECT format('prepared transaction %s', gid) FROM pg_prepared_xacts \
         UNION ALL SELECT format('role %s', rolname) FROM pg_roles WHERE rolname LIKE 'walferry%' ORDER BY 1";
    let rows = client.query(query, &[]).await.unwrap();
    rows.into_iter().map(|row| format!("{} on the {side}", row.get::<_, &str>(0))).collect()
}
