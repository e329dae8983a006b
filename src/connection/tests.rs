//! What libpq documents about connection strings, and that none of it shows a password.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::environment::{Environment, password_file_escaped, password_from_file};
use super::spec::ConnectionSpec;
use super::{parse, settings};
use crate::error::{ErrorKind, Result};

fn surroundings(variables: &[(&str, &str)], home: Option<&Path>) -> Environment {
    let variables: HashMap<String, String> =
        variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Environment { variables, home: home.map(Path::to_owned), user: Some("me".to_owned()) }
}

fn parsed(text: &str) -> Result<ConnectionSpec> {
    ConnectionSpec::parse_in(text, &surroundings(&[], None))
}

/// The parameters in their order, as libpq's own `uri-regress` prints them.
fn parameters(text: &str) -> String {
    match parse::parameters(text) {
        Ok(found) => found.iter().map(|(name, value)| format!("{name}='{value}'")).collect::<Vec<_>>().join(" "),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Usage);
            "wrong".to_owned()
        }
    }
}

#[test]
fn urls_mean_what_they_mean_to_libpq() {
    // After src/interfaces/libpq/t/001_uri.pl of PostgreSQL.
    for (url, expected) in [
        (
            "postgresql://uri-user:secret@host:12345/db",
            "user='uri-user' password='secret' host='host' port='12345' dbname='db'",
        ),
        ("postgresql://uri-user@host:12345/db", "user='uri-user' host='host' port='12345' dbname='db'"),
        ("postgresql://uri-user@host/db", "user='uri-user' host='host' dbname='db'"),
        ("postgresql://host:12345/db", "host='host' port='12345' dbname='db'"),
        ("postgresql://host/db", "host='host' dbname='db'"),
        ("postgresql://uri-user@host:12345/", "user='uri-user' host='host' port='12345'"),
        ("postgresql://uri-user@", "user='uri-user'"),
        ("postgresql://uri-user:@host", "user='uri-user' host='host'"),
        ("postgresql://", ""),
        ("postgres://", ""),
        ("postgresql:///", ""),
        ("postgresql://host?user=uri-user", "host='host' user='uri-user'"),
        ("postgresql://?host=path/to/socket", "host='path/to/socket'"),
        ("postgresql://%2Fvar%2Flib/dbname", "host='/var/lib' dbname='dbname'"),
        ("postgresql://host/db?user=uri-user&port=12345", "host='host' dbname='db' user='uri-user' port='12345'"),
        ("postgresql://host:1/?", "host='host' port='1'"),
        ("postgresql://uri%2Duser:p%40s%3As%2f@host", "user='uri-user' password='p@s:s/' host='host'"),
        ("postgresql://host/db?u%73er=someotheruser", "host='host' dbname='db' user='someotheruser'"),
        ("postgresql://h/db?options=-c%20work_mem%3D1GB", "host='h' dbname='db' options='-c work_mem=1GB'"),
        ("postgresql://h?ssl=true", "host='h' sslmode='require'"),
        ("postgresql://[::1]:12345/db", "host='::1' port='12345' dbname='db'"),
        ("postgresql://[2001:db8::1234]", "host='2001:db8::1234'"),
        ("postgresql://u@[::1],[::2]:3/d", "user='u' host='::1,::2' port=',3' dbname='d'"),
        (
            "postgresql://a:1,b:2/d?target_session_attrs=any",
            "host='a,b' port='1,2' dbname='d' target_session_attrs='any'",
        ),
        ("postgresql://u:p?q#r+s@h", "user='u' password='p?q#r+s' host='h'"),
        ("postgres://host?sslmode=verify-full", "host='host' sslmode='verify-full'"),
        // What libpq refuses.
        ("postgresql://host/db?u%7aer=x", "wrong"),
        ("postgresql://host?uzer=", "wrong"),
        ("postgre://", "wrong"),
        ("mysql://host/db", "wrong"),
        ("postgres://[::1", "wrong"),
        ("postgres://[]", "wrong"),
        ("postgres://[::1]z", "wrong"),
        ("postgresql://host?zzz", "wrong"),
        ("postgresql://host?user=a&port", "wrong"),
        ("postgresql://host?user=a=b", "wrong"),
        ("postgres://host?user&value=a", "wrong"),
        ("postgresql://%", "wrong"),
        ("postgres://%1", "wrong"),
        ("postgres://%zz", "wrong"),
        ("postgres://u:%00@h", "wrong"),
        ("postgres://u:%ff@h", "wrong"),
        ("postgres://h:port", "wrong"),
        // A password that is not encoded must not become a host or a port.
        ("postgres://u:pa/ss@h/d", "wrong"),
        ("postgres://u:pa@ss@h/d", "wrong"),
    ] {
        assert_eq!(parameters(url), expected, "{url}");
    }
}

#[test]
fn pairs_mean_what_they_mean_to_libpq() {
    for (text, expected) in [
        ("", ""),
        ("  ", ""),
        (
            "host=localhost port=5432 dbname=mydb connect_timeout=10",
            "host='localhost' port='5432' dbname='mydb' connect_timeout='10'",
        ),
        (" host = a\tport\n=\n5 ", "host='a' port='5'"),
        ("password=''", "password=''"),
        ("password='it\\'s \\\\'", "password='it's \\'"),
        ("password=a\\ b\\'", "password='a b''"),
        ("password=x=y user=u", "password='x=y' user='u'"),
        ("password=a'b", "password='a'b'"),
        ("user=a password=p://q", "user='a' password='p://q'"),
        ("host='a' user='b'", "host='a' user='b'"),
        ("password=ends\\", "password='ends'"),
        ("mydb", "wrong"),
        ("host=a secret", "wrong"),
        ("password='open", "wrong"),
        ("=x", "wrong"),
        ("hots=a", "wrong"),
        ("host=a\0b", "wrong"),
    ] {
        assert_eq!(parameters(text), expected, "{text}");
    }
}

#[test]
fn a_message_says_where_and_never_what() {
    for text in [
        "host=h password=correct horse",
        "password=correct hors=1",
        "postgres://u:correct/horse@h/d",
        "postgres://u:correct@horse@h/d",
        "postgres://u:correct%horse@h/d",
        "postgres://u:12345correct/horse@h",
        "postgres://h/d?horse=correct",
        "password='correct horse",
        "port=correct user=horse",
        "sslmode=correct user=horse",
        "hostaddr=correct user=horse",
        "connect_timeout=correct keepalives=horse",
        "require_auth=correct",
    ] {
        let error = parsed(text).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        let shown = format!("{error:?}");
        assert!(!shown.contains("correct") && !shown.contains("hors"), "{shown}");
    }
    let error = parsed("host=h databse=d").map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("character 8"), "{error}");
    let error = parsed("host=h sslmod=d").map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("\"sslmode\""), "{error}");
}

#[test]
fn what_cannot_be_kept_is_refused_by_name() {
    for (parameter, value) in [
        ("sslcrl", "f"),
        ("requirepeer", "postgres"),
        ("require_auth", "scram-sha-256"),
        ("gssencmode", "require"),
        ("sslnegotiation", "direct"),
        ("load_balance_hosts", "random"),
        ("sslpassword", "p"),
        ("replication", "database"),
        ("sslcertmode", "require"),
        ("sslmode", "verify-everything"),
        ("target_session_attrs", "some"),
        ("channel_binding", "yes"),
        ("port", "0"),
        ("port", "65536"),
        ("hostaddr", "localhost"),
        ("keepalives_idle", "1.5"),
        ("ssl_max_protocol_version", "TLSv1"),
    ] {
        let error = parsed(&format!("{parameter}={value}")).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains(parameter), "{error}");
    }
    parsed("sslrootcert=system sslmode=require").unwrap_err();
    parsed("host=a,b port=1,2,3").unwrap_err();
    parsed("host=a,b hostaddr=127.0.0.1").unwrap_err();
    for harmless in ["gssencmode=disable", "gssencmode=prefer", "krbsrvname=x", "sslnegotiation=postgres", "sslcrl=''"]
    {
        parsed(harmless).unwrap();
    }
}

#[test]
fn gaps_are_filled_in_libpqs_order() {
    let home = tempfile::tempdir().unwrap();
    let services =
        "# comment\n[other]\nhost=wrong\n\n[mine]\nhost=from-service\nport=1111\nhost=second\nuser=service-user\n";
    std::fs::write(home.path().join(".pg_service.conf"), services).unwrap();
    let parse = |text: &str, variables: &[(&str, &str)]| {
        ConnectionSpec::parse_in(text, &surroundings(variables, Some(home.path())))
    };
    for (text, variables, expected) in [
        ("host=h", &[][..], "me@h:5432/me"),
        ("host=h user=u", &[], "u@h:5432/u"),
        ("host=h dbname=d", &[("PGPORT", "7"), ("PGUSER", "v"), ("PGDATABASE", "x")], "v@h:7/d"),
        ("", &[("PGHOST", "h"), ("PGPORT", "")], "me@h:5432/me"),
        ("service=mine", &[("PGHOST", "variable"), ("PGDATABASE", "d")], "service-user@from-service:1111/d"),
        ("user=u", &[("PGSERVICE", "mine")], "u@from-service:1111/u"),
        ("postgres://?service=mine", &[], "service-user@from-service:1111/service-user"),
        ("hostaddr=::1", &[], "me@[::1]:5432/me"),
        ("postgres://[::1],h:3/", &[], "me@[::1]:5432,h:3/me"),
        ("host=a,b port=9", &[], "me@a:9,b:9/me"),
        ("host=/run/x", &[], "me@/run/x:5432/me"),
        ("host=@abstract", &[], "me@@abstract:5432/me"),
    ] {
        assert_eq!(parse(text, variables).unwrap().describe(), expected, "{text}");
    }
    let socket = parse("", &[]).unwrap();
    assert!(socket.hosts[0].is_unix(), "{socket}");
    for (text, variables) in [("service=absent", &[][..]), ("service=mine", &[("PGSERVICEFILE", "/nowhere")])] {
        assert_eq!(parse(text, variables).map(|_| ()).unwrap_err().kind(), ErrorKind::Usage);
    }
    std::fs::write(home.path().join(".pg_service.conf"), "[mine]\nhots=h\n").unwrap();
    let error = parse("service=mine", &[]).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("line 2"), "{error}");
    assert!(!parse("host=h", &[("PGPASSWORD", "secret")]).unwrap().has_inline_password());
    assert!(parse("host=h password=secret", &[]).unwrap().has_inline_password());
}

fn password_file(directory: &Path, text: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = directory.join("passwords");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    path
}

#[test]
fn the_first_line_of_a_password_file_that_fits_wins() {
    let directory = tempfile::tempdir().unwrap();
    let text = "#h:1:d:u:comment\nh:1:d:u:first\nh:1:d:u:second\r\na\\:b:*:d:u:x\\:y\\\\z\n*:2:*:*:any:more\n*:3:*:*:\nshort\n\
                *:4:*:*:ends\\\n";
    let path = password_file(directory.path(), text);
    for (fields, expected) in [
        (["h", "1", "d", "u"], Some("first")),
        (["a:b", "9", "d", "u"], Some("x:y\\z")),
        (["h", "2", "x", "y"], Some("any")),
        (["h", "3", "x", "y"], Some("")),
        (["h", "4", "x", "y"], Some("ends\\")),
        (["h", "1", "d", "other"], None),
        (["short", "", "", ""], None),
    ] {
        assert_eq!(password_from_file(&path, fields).as_deref(), expected, "{fields:?}");
    }
    assert_eq!(password_from_file(Path::new("/nowhere"), ["", "", "", ""]), None);
}

/// Percent-encodes every byte.
fn encoded(value: &str) -> String {
    value.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

/// Text as people (and machines) put into names and passwords: everything but NUL.
fn any_text() -> impl Strategy<Value = String> {
    prop_oneof!["[^\\x00]{1,20}", "[ '\\\\=:/@?#%&\\[\\]\"$\\n]{1,12}", "[a-zA-Z0-9]{1,12}"]
}

proptest! {
    #[test]
    fn any_password_database_and_user_come_through_a_url_and_pairs(
        user in any_text(), password in any_text(), database in any_text(),
    ) {
        let url = format!("postgresql://{}:{}@h:1/{}", encoded(&user), encoded(&password), encoded(&database));
        let quoted = |value: &str| format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"));
        let pairs = format!("user={} password={} dbname={}", quoted(&user), quoted(&password), quoted(&database));
        for text in [url, pairs] {
            let found: HashMap<_, _> = parse::parameters(&text).unwrap().into_iter().collect();
            prop_assert_eq!(&found["user"], &user);
            prop_assert_eq!(&found["password"], &password);
            prop_assert_eq!(&found["dbname"], &database);
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in ".*", rest in any_text()) {
        let _ = parsed(&text);
        let _ = parsed(&format!("postgres://{text}"));
        let _ = parsed(&format!("postgres://u:{rest}@{text}?{rest}"));
        let _ = parsed(&format!("host={text} password='{rest}"));
    }

    #[test]
    fn a_password_is_never_shown(password in "[a-z]{3}[^\\x00]{9,20}", user in "[A-Z]{1,8}") {
        let url = format!("postgresql://{user}:{}@h,[::1]:7/D?sslmode=disable", encoded(&password));
        let spec = parsed(&url).unwrap();
        for shown in [format!("{spec:?}"), spec.to_string(), spec.describe(), spec.without_password()] {
            prop_assert!(!shown.contains(&password), "{}", shown);
            prop_assert!(!shown.contains("password"), "{}", shown);
        }
        // An unencoded one breaks the URL in some way, or does not; it is not shown either way.
        if let Err(error) = parsed(&format!("postgresql://{user}:{password}@h/D?x")) {
            let shown = format!("{error:?}");
            prop_assert!(!shown.contains(&password), "{}", shown);
        }
    }

    #[test]
    fn a_string_without_password_reads_back_as_the_same_connection(
        user in any_text(), database in any_text(), options in any_text(), port in 1_u16..,
    ) {
        let text = format!(
            "host=a,/run/x,@y user={} dbname={} options={} port={port},1,2 password=secret sslmode=verify-ca \
             connect_timeout=3 keepalives_idle=9 target_session_attrs=primary",
            parse::quote(&user), parse::quote(&database), parse::quote(&options),
        );
        let spec = parsed(&text).unwrap();
        // In other surroundings too.
        let others = surroundings(&[("PGUSER", "x"), ("PGHOST", "y"), ("PGPORT", "3"), ("PGSSLMODE", "disable")], None);
        let again = ConnectionSpec::parse_in(&spec.without_password(), &others).unwrap();
        prop_assert_eq!(again.without_password(), spec.without_password());
        prop_assert_eq!(again.describe(), spec.describe());
        prop_assert_eq!((&again.user, &again.database, &again.hosts), (&user, &database, &spec.hosts));
        prop_assert_eq!((again.tls.mode, again.wanted, again.keepalive), (spec.tls.mode, spec.wanted, spec.keepalive));
        prop_assert!(again.options().starts_with(settings::options(Some(&options)).as_str()));
    }

    #[test]
    fn a_password_comes_through_a_password_file(password in "[^\\x00\\r\\n]{1,20}", host in "[^\\x00\\r\\n*#]{1,9}") {
        let directory = tempfile::tempdir().unwrap();
        let (name, value) = (password_file_escaped(&host), password_file_escaped(&password));
        let path = password_file(directory.path(), &format!("{name}:1:*:*:{value}\n"));
        prop_assert_eq!(password_from_file(&path, [&host, "1", "d", "u"]), Some(password));
    }
}
