//! The example for Kubernetes, against the definitions of its kinds.

use serde_json::Value;

use super::{read, schema, yaml};

#[test]
fn the_manifests_are_what_kubernetes_takes() {
    let schema: Value = serde_json::from_str(&read("tests/packaging/kubernetes/schema.json")).unwrap();
    let manifests = yaml("packaging/kubernetes/walferry.yml");
    let kinds: Vec<&str> = manifests.iter().map(|manifest| manifest["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["Secret", "Service", "StatefulSet"]);
    for (kind, manifest) in kinds.iter().zip(&manifests) {
        assert_eq!(schema::violations(&schema, &schema["definitions"][kind], manifest), [""; 0], "{kind}");
        assert_eq!(
            manifest["apiVersion"], schema["definitions"][kind]["properties"]["apiVersion"]["enum"][0],
            "{kind}"
        );
    }
    // What the definitions do not say: that the names in it mean each other.
    let [secret, service, set] = &manifests[..] else { unreachable!() };
    let pod = &set["spec"]["template"];
    assert_eq!(set["spec"]["serviceName"], service["metadata"]["name"]);
    assert_eq!(set["spec"]["selector"]["matchLabels"], pod["metadata"]["labels"]);
    assert_eq!(service["spec"]["selector"], pod["metadata"]["labels"]);
    let container = &pod["spec"]["containers"][0];
    let volumes = pod["spec"]["volumes"].as_array().unwrap().iter().map(|volume| &volume["name"]);
    let claims = set["spec"]["volumeClaimTemplates"].as_array().unwrap().iter().map(|claim| &claim["metadata"]["name"]);
    let named: Vec<&Value> = volumes.chain(claims).collect();
    let mounts = container["volumeMounts"].as_array().unwrap();
    assert!(mounts.len() == named.len() && mounts.iter().all(|mount| named.contains(&&mount["name"])), "{named:?}");
    assert_eq!(pod["spec"]["volumes"][0]["secret"]["secretName"], secret["metadata"]["name"]);
    let image = format!("walferry:{}", env!("CARGO_PKG_VERSION"));
    assert_eq!(container["image"], image.as_str());

    // The image's user owns the volume, and its passwords are files that the arguments name.
    let user = &pod["spec"]["securityContext"]["runAsUser"];
    assert!(read("Dockerfile").contains(&format!("\nUSER {user}:{user}\n")));
    for password in secret["stringData"].as_object().unwrap().keys() {
        let file = format!("cat /run/passwords/{password}");
        let arguments = container["args"].as_array().unwrap();
        assert!(arguments.iter().any(|argument| argument.as_str().unwrap().ends_with(&file)), "{file}: {arguments:?}");
    }
}

/// The arguments are options of the program: a wrong one ends it with 2, before it connects to anything.
#[test]
fn the_arguments_of_the_examples_are_the_programs() {
    let set = yaml("packaging/kubernetes/walferry.yml").pop().unwrap();
    let of_set = set["spec"]["template"]["spec"]["containers"][0]["args"].clone();
    let of_trial = yaml("docker-compose.yml")[0]["services"]["walferry"]["command"].clone();
    for arguments in [of_set, of_trial] {
        let arguments: Vec<&str> = arguments.as_array().unwrap().iter().map(|value| value.as_str().unwrap()).collect();
        let servers = ["walferry", "--source", "postgres://a/b", "--target", "postgres://c/d", "--dir", "/nowhere"];
        let all = [&["walferry"], &arguments[..], &servers[1..]].concat();
        let parsed = <walferry::cli::Cli as clap::Parser>::try_parse_from(&all);
        assert!(parsed.is_ok(), "{all:?}: {}", parsed.unwrap_err());
    }
}
