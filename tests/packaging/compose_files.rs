//! What can be said of the files of the trial without running them: this is all that is checked where no engine runs.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{file, read, schema, yaml};

const TRIAL: &str = "docker-compose.yml";
const TIMESCALEDB: &str = "docker-compose.timescaledb.yml";
const OVERRIDE: &str = "tests/packaging/compose/override.yml";

fn compose(name: &str) -> Value {
    yaml(name).into_iter().next().unwrap()
}

fn services(document: &Value) -> &serde_json::Map<String, Value> {
    document["services"].as_object().unwrap()
}

#[test]
fn the_compose_files_are_as_their_schema_says() {
    let schema: Value = serde_json::from_str(&read("tests/packaging/compose/compose_spec.json")).unwrap();
    for name in [TRIAL, TIMESCALEDB, OVERRIDE] {
        assert_eq!(schema::violations(&schema, &schema, &compose(name)), [""; 0], "{name}");
    }
    // Those that are put over the trial change services that it has.
    let trial = compose(TRIAL);
    for name in [TIMESCALEDB, OVERRIDE] {
        for service in services(&compose(name)).keys() {
            assert!(services(&trial).contains_key(service), "{name}: {service}");
        }
    }
}

#[test]
fn nothing_of_the_trial_is_open_beyond_this_machine_and_all_of_it_is_pinned_and_has_a_health_check() {
    let trial = compose(TRIAL);
    let mut opened = 0;
    for (name, service) in services(&trial) {
        for port in service["ports"].as_array().into_iter().flatten() {
            assert!(port.as_str().unwrap().starts_with("127.0.0.1:"), "{name}: {port}");
            opened += 1;
        }
        assert!(service["network_mode"].is_null() || service["network_mode"] == "none", "{name}");
        // What runs once has an end instead, and walferry's is in its image.
        let runs_once = name == "prepare";
        assert!(!service["healthcheck"]["test"].is_null() || runs_once || name == "walferry", "{name}");
    }
    assert_eq!(opened, 3, "page, Prometheus and Grafana");
    assert!(read("Dockerfile").contains("\nHEALTHCHECK "));
    let of_files = [TRIAL, TIMESCALEDB].map(compose);
    let images = of_files
        .iter()
        .flat_map(|document| services(document).values())
        .filter_map(|service| service["image"].as_str());
    let dockerfile = read("Dockerfile");
    let defaults =
        dockerfile.lines().filter_map(|line| line.strip_prefix("ARG ")?.split_once("_IMAGE=")).map(|(_, image)| image);
    for image in images.chain(defaults) {
        let (_, tag) = image.split_once(':').unwrap_or_else(|| panic!("{image} has no version"));
        assert!(tag.chars().filter(char::is_ascii_digit).count() >= 2 && tag.contains(['.', '-']), "{image}");
    }
    assert_eq!(services(&trial)["walferry"]["image"], concat!("walferry:", env!("CARGO_PKG_VERSION")));
}

#[test]
fn each_service_gets_its_own_secrets_and_no_other() {
    let trial = compose(TRIAL);
    for (name, service) in services(&trial) {
        let environment = service["environment"].as_object().into_iter().flatten();
        for (variable, _) in environment {
            assert!(!variable.contains("PASSWORD") || variable.ends_with("_FILE"), "{name}: {variable}");
        }
        let volumes = service["volumes"].as_array().into_iter().flatten().map(|volume| volume.as_str().unwrap());
        let secrets: BTreeSet<&str> = volumes.filter_map(|volume| volume.strip_prefix("secrets-")).collect();
        let own = format!("{name}:/run/trial:ro");
        let expected = ["source", "target", "load", "walferry"].contains(&name.as_str()).then_some(own.as_str());
        assert!(name == "prepare" || secrets == expected.into_iter().collect(), "{name}: {secrets:?}");
    }
}

#[test]
fn what_the_compose_files_bring_into_containers_is_there() {
    for name in [TRIAL, TIMESCALEDB, OVERRIDE] {
        for (service, options) in services(&compose(name)) {
            for volume in options["volumes"].as_array().into_iter().flatten().map(|volume| volume.as_str().unwrap()) {
                let Some(path) = volume.split(':').next().unwrap().strip_prefix("./") else { continue };
                assert!(file(path).exists(), "{name}, {service}: {path}");
            }
        }
    }
}

/// What Grafana's provisioning takes (its manual, "Provision Grafana"), as far as files can be wrong.
#[test]
fn grafana_finds_its_data_source_and_the_dashboard() {
    let sources = compose("dashboards/provisioning/datasources/prometheus.yml");
    assert_eq!(sources["apiVersion"], 1);
    let source = &sources["datasources"][0];
    assert_eq!((source["type"].as_str(), source["access"].as_str()), (Some("prometheus"), Some("proxy")));
    assert!(source["uid"].is_string() && source["isDefault"] == true, "the dashboard's variable takes the default");
    let trial = compose(TRIAL);
    let url = source["url"].as_str().unwrap();
    let (host, port) = url.strip_prefix("http://").unwrap().split_once(':').unwrap();
    assert!(services(&trial)[host]["ports"][0].as_str().unwrap().ends_with(port), "{url}");

    let providers = compose("dashboards/provisioning/dashboards/walferry.yml");
    assert_eq!(providers["apiVersion"], 1);
    let provider = &providers["providers"][0];
    assert!(provider["name"].is_string() && provider["type"] == "file", "{provider}");
    let grafana = &services(&trial)["grafana"];
    let volumes: Vec<&str> =
        grafana["volumes"].as_array().unwrap().iter().map(|volume| volume.as_str().unwrap()).collect();
    assert!(volumes.contains(&"./dashboards/provisioning:/etc/grafana/provisioning:ro"), "{volumes:?}");
    let place = format!("{}/walferry.json", provider["options"]["path"].as_str().unwrap());
    assert!(volumes.contains(&format!("./dashboards/walferry.json:{place}:ro").as_str()), "{place}: {volumes:?}");
    assert_eq!(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"], place);
}
