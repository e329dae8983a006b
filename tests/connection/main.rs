//! Connections to a real server: every sslmode, every way to give a password, and the stream of a slot.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends at the first surprise")]

mod server;

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use server::{PASSWORD, Server, quoted};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_postgres::Client;
use walferry::connection::ConnectionSpec;
use walferry::error::{Error, ErrorKind};
use walferry::lsn::Lsn;
use walferry::source::replication::{ReplicationSession, StreamEvent};

async fn text(client: &Client, sql: &str) -> String {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

async fn is_encrypted(client: &Client) -> bool {
    let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    client.query_one(sql, &[]).await.unwrap().get(0)
}

async fn refusal(spec: &ConnectionSpec) -> Error {
    let client = spec.connect("refused").await.map(|_| ()).unwrap_err();
    let session = ReplicationSession::connect(spec, "refused").await.map(|_| ()).unwrap_err();
    assert_eq!(client.kind(), session.kind(), "{client:?} and {session:?}");
    assert_eq!(client.sqlstate(), session.sqlstate(), "{client:?} and {session:?}");
    for error in [&client, &session] {
        assert!(!format!("{error:?}").contains(PASSWORD), "an error shows the password");
    }
    client
}

/// Both clients log in; whether the session is encrypted.
async fn both(spec: &ConnectionSpec) -> bool {
    let client = spec.connect("both").await.unwrap();
    let mut session = ReplicationSession::connect(spec, "both").await.unwrap();
    let sql = "SELECT ssl FROM pg_catalog.pg_stat_ssl WHERE pid = pg_catalog.pg_backend_pid()";
    let encrypted = session.simple_query(sql).await.unwrap() == [[Some("t".to_owned())]];
    assert_eq!(is_encrypted(&client).await, encrypted);
    session.close().await;
    encrypted
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_sslmode_gives_what_it_promises_to_both_clients() {
    let server = Server::start("server").await;
    let (ca, other) = (server.path("ca.crt"), server.path("other.crt"));

    for (mode, encrypted) in [("disable", false), ("allow", false), ("prefer", true), ("require", true)] {
        assert_eq!(both(&server.tcp(&format!("user=scram sslmode={mode}"))).await, encrypted, "{mode}");
    }
    // What only one of the ways can do is reached from the other.
    assert!(both(&server.tcp("user=tlsonly sslmode=allow")).await);
    assert!(!both(&server.tcp("user=plainonly sslmode=prefer")).await);
    let error = refusal(&server.tcp("user=tlsonly sslmode=disable")).await;
    assert_eq!(error.sqlstate().map(|state| state.code()), Some("28000"), "{error:?}");

    assert!(both(&server.tcp(&format!("user=scram sslmode=verify-ca sslrootcert={ca}"))).await);
    assert!(both(&server.tcp(&format!("user=scram sslmode=verify-full sslrootcert={ca}"))).await);
    let by_name = |host: &str, more: &str| {
        let password = quoted(PASSWORD);
        let text = format!(
            "host={host} hostaddr=127.0.0.1 port={} user=scram dbname=postgres password={password} {more}",
            server.port
        );
        ConnectionSpec::parse(&text).unwrap()
    };
    assert!(both(&by_name("db.example", &format!("sslmode=verify-full sslrootcert={ca}"))).await);
    let wrong_name = refusal(&by_name("evil.example", &format!("sslmode=verify-full sslrootcert={ca}"))).await;
    assert_eq!(wrong_name.kind(), ErrorKind::Other, "{wrong_name:?}");
    assert!(wrong_name.to_string().contains("evil.example"), "{wrong_name:?}");
    assert!(both(&by_name("evil.example", &format!("sslmode=verify-ca sslrootcert={ca}"))).await);

    for mode in ["require", "verify-ca", "verify-full"] {
        let error = refusal(&server.tcp(&format!("user=scram sslmode={mode} sslrootcert={other}"))).await;
        assert_eq!(error.kind(), ErrorKind::Other, "{mode}: {error:?}");
        let error = refusal(&server.tcp(&format!("user=scram sslmode={mode} sslrootcert=/nowhere.crt"))).await;
        assert_eq!(error.kind(), ErrorKind::Usage, "{mode}: {error:?}");
    }
    let system = refusal(&server.tcp("user=scram sslrootcert=system")).await;
    assert!(matches!(system.kind(), ErrorKind::Other | ErrorKind::Usage), "{system:?}");

    // SCRAM bound to the TLS session, and refused where there is none to bind it to.
    assert!(both(&server.tcp("user=scram sslmode=require channel_binding=require")).await);
    refusal(&server.tcp("user=scram sslmode=disable channel_binding=require")).await;
    refusal(&server.tcp("user=md5user sslmode=require channel_binding=require")).await;

    for versions in ["ssl_max_protocol_version=TLSv1.2", "ssl_min_protocol_version=TLSv1.3"] {
        assert!(both(&server.tcp(&format!("user=scram sslmode=verify-full sslrootcert={ca} {versions}"))).await);
    }

    // A client certificate in place of a password.
    let (certificate, key) = (server.path("client.crt"), server.path("client.key"));
    let certified = format!("user=certified sslmode=verify-full sslrootcert={ca}");
    assert!(both(&server.tcp(&format!("{certified} sslcert={certificate} sslkey={key}"))).await);
    refusal(&server.tcp(&certified)).await;
    let stranger = format!("{certified} sslcert={other} sslkey={}", server.path("other.key"));
    let error = refusal(&server.tcp(&stranger)).await;
    assert!(!error.is_transient(), "{error:?}");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = refusal(&server.tcp(&format!("{certified} sslcert={certificate} sslkey={key}"))).await;
    assert_eq!(error.kind(), ErrorKind::Usage, "{error:?}");

    // A server without TLS.
    let admin = server.socket().connect("admin").await.unwrap();
    admin.batch_execute("ALTER SYSTEM SET ssl = off").await.unwrap();
    admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let reloaded = async {
        while text(&server.socket().connect("reloaded").await.unwrap(), "SHOW ssl").await == "on" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), reloaded).await.expect("the server reads its configuration again");
    for mode in ["disable", "allow", "prefer"] {
        assert!(!both(&server.tcp(&format!("user=scram sslmode={mode}"))).await, "{mode}");
    }
    for mode in ["require".to_owned(), format!("verify-full sslrootcert={ca}")] {
        let error = refusal(&server.tcp(&format!("user=scram sslmode={mode}"))).await;
        assert!(error.kind() == ErrorKind::Usage && error.to_string().contains("does not offer TLS"), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_without_alternative_names_is_checked_by_its_common_name() {
    let server = Server::start("named").await;
    let ca = server.path("ca.crt");
    let spec = |host: &str| {
        let text = server.string(&format!("user=scram sslmode=verify-full sslrootcert={ca}"));
        let text = text.replace("host=127.0.0.1", &format!("host={host} hostaddr=127.0.0.1"));
        ConnectionSpec::parse(&format!("{text} password={}", quoted(PASSWORD))).unwrap()
    };
    assert!(both(&spec("localhost")).await);
    let error = refusal(&spec("db.example")).await;
    assert_eq!(error.kind(), ErrorKind::Other, "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_self_signed_certificate_is_trusted_only_by_itself() {
    let server = Server::start("other").await;
    let spec = |host: &str, mode: &str, roots: &str| {
        let text = server.string(&format!("user=scram sslmode={mode} sslrootcert={}", server.path(roots)));
        let text = text.replace("host=127.0.0.1", &format!("host={host} hostaddr=127.0.0.1"));
        ConnectionSpec::parse(&format!("{text} password={}", quoted(PASSWORD))).unwrap()
    };
    assert!(both(&spec("stranger", "verify-full", "other.crt")).await);
    assert!(both(&spec("another", "verify-ca", "other.crt")).await);
    for spec in [spec("another", "verify-full", "other.crt"), spec("stranger", "verify-full", "ca.crt")] {
        assert_eq!(refusal(&spec).await.kind(), ErrorKind::Other);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_to_give_a_password_works_with_every_method() {
    let server = Server::start("server").await;
    for user in ["scram", "md5user", "cleartext"] {
        both(&server.tcp(&format!("user={user}"))).await;
        let wrong = ConnectionSpec::parse(&server.string(&format!("user={user} password=wrong"))).unwrap();
        let error = refusal(&wrong).await;
        assert_eq!(error.sqlstate().map(|state| state.code()), Some("28P01"), "{error:?}");
        assert!(!error.is_transient() && error.next_step().is_some(), "{error:?}");
    }
    let without = |more: &str| ConnectionSpec::parse(&server.string(more)).unwrap();
    let error = refusal(&without("user=scram passfile=/dev/null")).await;
    assert_eq!(error.kind(), ErrorKind::Usage, "{error:?}");

    // A URL.
    let encoded: String = PASSWORD.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let url = format!("postgresql://scram:{encoded}@127.0.0.1:{}/postgres", server.port);
    both(&ConnectionSpec::parse(&url).unwrap()).await;

    // A command, run at every connect.
    let (file, runs) = (server.path("current"), server.path("runs"));
    std::fs::write(&file, format!("{PASSWORD}\n")).unwrap();
    let spec = without("user=scram").with_password_command(format!("echo x >> {runs}; cat {file}"));
    both(&spec).await;
    assert_eq!(std::fs::read_to_string(&runs).unwrap().lines().count(), 2);
    std::fs::write(&file, "expired").unwrap();
    assert_eq!(refusal(&spec).await.sqlstate().map(|state| state.code()), Some("28P01"));
    // Replaced while it was on its way: asked for again.
    let once = format!("if mkdir {0}.d; then echo old; else cat {0}.new; fi", file);
    std::fs::write(format!("{file}.new"), format!("{PASSWORD}\n")).unwrap();
    assert!(without("user=scram").with_password_command(once).connect("rotated").await.is_ok());
    let broken = without("user=scram").with_password_command("exit 3".to_owned());
    assert_eq!(refusal(&broken).await.kind(), ErrorKind::Transient);
    let missing = without("user=scram").with_password_command("/no/such/command".to_owned());
    assert_eq!(refusal(&missing).await.kind(), ErrorKind::Usage);

    // A password file: the first line that fits, unless others can read it.
    let escaped = PASSWORD.replace('\\', "\\\\").replace(':', "\\:");
    let file = server.path("passwords");
    let lines =
        format!("# comment\nelsewhere:*:*:*:wrong\n127.0.0.1:{}:*:scram:{escaped}\n*:*:*:*:wrong\n", server.port);
    std::fs::write(&file, lines).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    both(&without(&format!("user=scram passfile={file}"))).await;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(refusal(&without(&format!("user=scram passfile={file}"))).await.kind(), ErrorKind::Usage);

    // A child process gets it from neither argv nor environment.
    let spec = server.tcp("user=scram sslmode=require");
    let environment = spec.child_environment("a child").await.unwrap();
    assert!(!format!("{environment:?}").contains(PASSWORD));
    assert!(environment.variables().all(|(_, value)| !value.contains(PASSWORD)));
    let mut command = tokio::process::Command::new("psql");
    command.args([
        "-XAtwc",
        "SELECT current_user || ' ' || current_setting('application_name') || ' ' || ssl \
                             FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
    ]);
    // What the parent has set for itself must not reach the child.
    command.env("PGHOSTADDR", "192.0.2.1").env("PGSERVICE", "nowhere");
    let output = environment.apply(&mut command).output().await.unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "scram a child true\n", "{output:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_are_tried_in_order_until_one_is_what_is_wanted() {
    let server = Server::start("server").await;
    // Nothing listens on the first port; the second host has the server.
    let closed = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let string = |ports: &str, more: &str| {
        let password = quoted(PASSWORD);
        format!("host=127.0.0.1,127.0.0.1 port={ports} user=scram dbname=postgres password={password} {more}")
    };
    let spec = |ports: &str, more: &str| ConnectionSpec::parse(&string(ports, more)).unwrap();
    let ports = format!("{closed},{}", server.port);
    for wanted in ["any", "read-write", "primary", "prefer-standby"] {
        both(&spec(&ports, &format!("target_session_attrs={wanted}"))).await;
    }
    for wanted in ["read-only", "standby"] {
        let error = refusal(&spec(&ports, &format!("target_session_attrs={wanted}"))).await;
        assert!(error.is_transient() && error.to_string().contains("standby"), "{error:?}");
    }
    let error = refusal(&spec(&format!("{closed},{closed}"), "")).await;
    assert!(error.is_transient(), "{error:?}");

    // A refused login ends the search.
    let wrong =
        format!("host=127.0.0.1,{} port={} user=scram dbname=postgres password=no", server.path(""), server.port);
    let error = refusal(&ConnectionSpec::parse(&wrong).unwrap()).await;
    assert_eq!(error.sqlstate().map(|state| state.code()), Some("28P01"), "{error:?}");

    // From a task of its own, too, which needs futures that are Send.
    let socket = server.socket();
    tokio::spawn(async move { both(&socket).await }).await.unwrap();
    let nowhere = ConnectionSpec::parse("host=/nowhere user=postgres").unwrap();
    assert!(refusal(&nowhere).await.is_transient());
    let unknown = ConnectionSpec::parse("host=no-such-host.invalid user=postgres").unwrap();
    let error = refusal(&unknown).await;
    assert!(error.is_transient() && error.to_string().contains("no-such-host.invalid"), "{error:?}");
    assert!(error.next_step().is_some());
    for (more, state) in [("user=nobody", "28000"), ("user=stranger", "28P01"), ("user=scram dbname=none", "3D000")] {
        let error = refusal(&server.tcp(more)).await;
        assert_eq!(error.sqlstate().map(|state| state.code()), Some(state), "{error:?}");
        assert!(!error.is_transient(), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_server_does_not_hold_a_connect_for_ever() {
    // It takes the connection and never answers.
    let silent = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let text = format!("host=127.0.0.1 port={port} user=u connect_timeout=1 sslmode=disable");
    let error = ConnectionSpec::parse(&text).unwrap().connect("waiting").await.map(|_| ()).unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("within 2 s"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h36_a_pooler_in_the_way_is_named() {
    // What PgBouncer answers to a start-up message with options.
    let pooler = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = pooler.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = pooler.accept().await {
            let mut length = [0; 4];
            stream.read_exact(&mut length).await.unwrap();
            let mut rest = vec![0; u32::from_be_bytes(length) as usize - 4];
            stream.read_exact(&mut rest).await.unwrap();
            assert!(String::from_utf8_lossy(&rest).contains("DateStyle=ISO"));
            let fields = b"SFATAL\0C08P01\0Munsupported startup parameter: options\0\0";
            let mut answer = vec![b'E'];
            answer.extend_from_slice(&(fields.len() as u32 + 4).to_be_bytes());
            answer.extend_from_slice(fields);
            stream.write_all(&answer).await.unwrap();
        }
    });
    let spec = ConnectionSpec::parse(&format!("host=127.0.0.1 port={port} user=u sslmode=disable")).unwrap();
    let error = refusal(&spec).await;
    assert_eq!(error.kind(), ErrorKind::Blocked, "{error:?}");
    assert!(error.to_string().contains("pooler"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_cuts_scram_short_is_not_believed() {
    let impostor = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = impostor.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = impostor.accept().await {
            let mut request = [0; 4096];
            assert!(stream.read(&mut request).await.unwrap() > 0);
            stream.write_all(b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0").await.unwrap();
            assert!(stream.read(&mut request).await.unwrap() > 0);
            // Let in without any proof that it knows the password, and ready for queries.
            stream.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").await.unwrap();
            let _ = stream.read(&mut request).await;
        }
    });
    let text = format!("host=127.0.0.1 port={port} user=u password=p sslmode=disable");
    let error = refusal(&ConnectionSpec::parse(&text).unwrap()).await;
    assert_eq!(error.kind(), ErrorKind::Server, "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h13_settings_are_pinned_on_both_kinds_of_session_whatever_the_role_says() {
    let server = Server::start("server").await;
    let admin = server.socket().connect("admin").await.unwrap();
    let hostile = [
        ("DateStyle", "'German'"),
        ("IntervalStyle", "'iso_8601'"),
        ("TimeZone", "'Asia/Tokyo'"),
        ("extra_float_digits", "'0'"),
        ("bytea_output", "'escape'"),
        ("statement_timeout", "'1s'"),
        ("lock_timeout", "'1s'"),
        ("idle_session_timeout", "'1s'"),
        ("idle_in_transaction_session_timeout", "'1s'"),
        ("default_transaction_read_only", "'on'"),
        ("row_security", "'on'"),
        ("search_path", "'public'"),
        ("standard_conforming_strings", "'off'"),
        ("client_encoding", "'LATIN1'"),
    ];
    for (name, value) in hostile {
        admin.batch_execute(&format!("ALTER ROLE scram SET {name} = {value}")).await.unwrap();
    }
    let spec = server.tcp("user=scram options='-c DateStyle=German -c work_mem=7MB -c lock_timeout=3'");
    let client = spec.connect("pinned").await.unwrap();
    let mut session = ReplicationSession::connect(&spec, "pinned").await.unwrap();
    for (name, expected) in [
        ("DateStyle", "ISO, YMD"),
        ("IntervalStyle", "postgres"),
        ("TimeZone", "UTC"),
        ("extra_float_digits", "3"),
        ("bytea_output", "hex"),
        ("xmloption", "content"),
        ("lc_monetary", "C"),
        ("statement_timeout", "0"),
        ("lock_timeout", "0"),
        ("idle_session_timeout", "0"),
        ("idle_in_transaction_session_timeout", "0"),
        ("default_transaction_read_only", "off"),
        ("default_transaction_isolation", "read committed"),
        ("row_security", "off"),
        ("search_path", "pg_catalog"),
        ("standard_conforming_strings", "on"),
        ("client_encoding", "UTF8"),
        ("application_name", "pinned"),
        // The user's own are kept where they do no harm.
        ("work_mem", "7MB"),
    ] {
        assert_eq!(text(&client, &format!("SHOW {name}")).await, expected, "{name}");
        let on_walsender = session.simple_query(&format!("SHOW {name}")).await.unwrap();
        assert_eq!(on_walsender, [[Some(expected.to_owned())]], "{name} on the replication connection");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_made_with_a_snapshot_streams_an_insert_and_stops() {
    let server = Server::start("server").await;
    let spec = server.tcp("user=postgres sslmode=require");
    let client = spec.connect("test").await.unwrap();
    let publications = ["it's \"quoted\", \\ and comma".to_owned(), "second".to_owned()];
    let names: Vec<String> = publications.iter().map(|name| walferry::sql::identifier(name)).collect();
    client
        .batch_execute(&format!(
            "CREATE TABLE public.t (id int PRIMARY KEY, v text); INSERT INTO public.t VALUES (1, 'before'); \
             CREATE PUBLICATION {} FOR TABLE public.t; CREATE PUBLICATION {};",
            names[0], names[1]
        ))
        .await
        .unwrap();

    let mut maker = ReplicationSession::connect(&spec, "maker").await.unwrap();
    let identity = maker.identify_system().await.unwrap();
    let expected = text(&client, "SELECT system_identifier::text FROM pg_control_system()").await;
    assert_eq!((identity.system_id, identity.timeline, identity.database.as_str()), (expected, 1, "postgres"));
    assert!(identity.wal_flush > Lsn::ZERO);
    // An error leaves the session usable. (It also drops the session's temporary slots, so it comes before them.)
    let error = maker.simple_query("SELECT 1/0").await.unwrap_err();
    assert_eq!(error.sqlstate().map(|state| state.code()), Some("22012"), "{error:?}");
    maker.simple_query("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await.unwrap();
    let slot =
        maker.simple_query("CREATE_REPLICATION_SLOT made TEMPORARY LOGICAL pgoutput (SNAPSHOT 'use')").await.unwrap();
    let consistent: Lsn = slot[0][1].as_deref().unwrap().parse().unwrap();
    let snapshot = maker.simple_query("SELECT pg_catalog.pg_export_snapshot()").await.unwrap();
    let snapshot = snapshot[0][0].clone().unwrap();

    client.batch_execute("INSERT INTO public.t VALUES (2, 'after')").await.unwrap();
    let importer = spec.connect("importer").await.unwrap();
    importer
        .batch_execute(&format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}",
            walferry::sql::literal(&snapshot)
        ))
        .await
        .unwrap();
    assert_eq!(text(&importer, "SELECT string_agg(v, ' ') FROM public.t").await, "before");
    let pid: i32 = maker.backend_pid();
    let count = format!("SELECT count(*)::text FROM pg_stat_activity WHERE pid = {pid} AND application_name = 'maker'");
    assert_eq!(text(&client, &count).await, "1");

    maker.simple_query("ROLLBACK").await.unwrap();
    assert_eq!(maker.server_version(), Some(text(&client, "SHOW server_version_num").await[..2].parse().unwrap()));

    let mut stream = maker.start("made", consistent, &publications, false).await.unwrap();
    client.batch_execute("SELECT pg_logical_emit_message(true, 'walferry', 'marker')").await.unwrap();
    let (mut kinds, mut end) = (String::new(), Lsn::ZERO);
    while !kinds.ends_with("BMC") {
        match tokio::time::timeout(Duration::from_secs(30), stream.next()).await.unwrap().unwrap() {
            StreamEvent::Data { wal_start, data, .. } => {
                kinds.push(char::from(data[0]));
                end = end.max(wal_start);
            }
            StreamEvent::KeepAlive { wal_end, reply_requested, .. } => {
                if reply_requested {
                    stream.send_status(end.max(consistent), false).await.unwrap();
                }
                assert!(wal_end >= consistent);
            }
        }
    }
    assert_eq!(kinds, "BRICBMC", "an insert with its relation, then the message");

    // A dropped wait loses nothing.
    let waiting = tokio::time::timeout(Duration::from_millis(50), async {
        loop {
            if let StreamEvent::Data { .. } = stream.next().await.unwrap() {
                break;
            }
        }
    });
    assert!(waiting.await.is_err(), "nothing was written");
    stream.send_status(end, true).await.unwrap();
    let mut answered = false;
    while !answered {
        let event = tokio::time::timeout(Duration::from_secs(30), stream.next()).await.unwrap().unwrap();
        answered = matches!(event, StreamEvent::KeepAlive { .. });
    }
    assert!(!stream.has_buffered());
    stream.stop().await.unwrap();
    // It was temporary, so a session that is gone leaves none.
    while text(&client, "SELECT count(*)::text FROM pg_replication_slots").await != "0" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    let session = ReplicationSession::connect(&spec, "again").await.unwrap();
    let error = session.start("made", consistent, &publications, false).await.map(|_| ()).unwrap_err();
    assert_eq!(error.sqlstate().map(|state| state.code()), Some("42704"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_in_a_burst_comes_whole_and_in_order_and_a_dead_server_is_transient() {
    let server = Server::start("server").await;
    let spec = server.tcp("user=postgres sslmode=require");
    let client = spec.connect("test").await.unwrap();
    client
        .batch_execute("CREATE TABLE public.t (id int PRIMARY KEY, v text); CREATE PUBLICATION p FOR TABLE public.t")
        .await
        .unwrap();
    let mut session = ReplicationSession::connect(&spec, "stream").await.unwrap();
    session.simple_query("CREATE_REPLICATION_SLOT s LOGICAL pgoutput NOEXPORT_SNAPSHOT").await.unwrap();
    let pid = session.backend_pid();
    let mut stream = session.start("s", Lsn::ZERO, &["p".to_owned()], true).await.unwrap();
    // Small rows, and some that are larger than every buffer.
    client
        .batch_execute(
            "INSERT INTO public.t SELECT i, repeat('x', CASE WHEN i % 1000 = 0 THEN 700000 ELSE i % 50 END) \
             FROM generate_series(1, 5000) i",
        )
        .await
        .unwrap();
    // Time for the socket to fill.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (mut rows, mut at_once) = (0_u32, 0);
    let see = |data: &[u8], rows: &mut u32| {
        if data[0] == b'I' {
            *rows += 1;
            // Relation, 'N', 2 columns, 'b' for binary, length 4, then the key.
            assert_eq!(data[8], b'b', "binary was asked for");
            assert_eq!(data[13..17], rows.to_be_bytes());
        }
    };
    while rows < 5000 {
        // Dropped again and again in the middle of messages; what is in the buffer by then is left to the reader of the message.
        let event = tokio::time::timeout(Duration::from_micros(200), stream.next()).await;
        if let Ok(event) = event
            && let StreamEvent::Data { data, .. } = event.unwrap()
        {
            see(&data, &mut rows);
        }
        let taken = stream.take_buffered(|event| {
            if let StreamEvent::Data { data, .. } = event {
                see(data, &mut rows);
                at_once += 1;
            }
            Ok(())
        });
        taken.unwrap();
        assert!(!stream.has_buffered(), "nothing that is whole stays behind");
    }
    assert!(at_once > 0, "whole messages were waiting in the buffer");
    client.batch_execute(&format!("SELECT pg_terminate_backend({pid})")).await.unwrap();
    let error = loop {
        if let Err(error) = stream.next().await {
            break error;
        }
    };
    assert!(error.is_transient(), "{error:?}");
}
