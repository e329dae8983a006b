//! Configuration tables of extensions that a service owns.

use crate::service::{RDS, superuser};
use crate::support::Servers;

/// As the script of an extension would do it, whose files a test cannot put onto the server.
const CONFIGURATION: &str = "CREATE EXTENSION hstore; CREATE TABLE known (name text PRIMARY KEY); CREATE SEQUENCE number; \
     GRANT SELECT ON known, number TO PUBLIC; ALTER EXTENSION hstore ADD TABLE known; ALTER EXTENSION hstore ADD SEQUENCE number; \
     UPDATE pg_extension SET extconfig = ARRAY['known'::regclass::oid, 'number'::regclass], extcondition = ARRAY['', ''] \
         WHERE extname = 'hstore'";

#[tokio::test]
async fn rows_of_an_extensions_configuration_that_the_role_may_not_write_are_named_beforehand() {
    let servers = Servers::start().await;
    let migration = RDS.migration(&servers).await;
    let (source, target) = (superuser(&servers.source).await, superuser(&servers.target).await);
    for side in [&source, &target] {
        side.batch_execute(CONFIGURATION).await.unwrap();
    }
    let finding = async || {
        let check = migration.with_servers("check", &["--estimate-seconds", "0", "--json"]).await;
        let report = check.json();
        let findings = report["findings"].as_array().unwrap();
        let found = findings.iter().find(|finding| finding["code"] == "extension-configuration-unwritable");
        found.map(|found| (check.code, found["object"].to_string(), found["fix"].as_str().unwrap().to_owned()))
    };
    assert_eq!(finding().await, None, "nobody has rows there");

    source.batch_execute("INSERT INTO known VALUES ('ours'); SELECT nextval('number')").await.unwrap();
    let (code, object, fix) = finding().await.unwrap();
    assert_eq!(code, Some(3));
    assert!(object.contains("known") && object.contains("number") && object.contains("hstore"), "{object}");
    target.batch_execute(&fix).await.unwrap();
    assert_eq!(finding().await, None);

    // One that our role would make: what comes with it is not its own either.
    target.batch_execute("DROP EXTENSION hstore").await.unwrap();
    let (_, _, fix) = finding().await.unwrap();
    assert!(fix.contains("CREATE EXTENSION \"hstore\""), "{fix}");
}
