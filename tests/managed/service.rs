//! Two servers with the roles of a managed service, made by a superuser that the migration never is.

use tokio_postgres::Client;
use walferry::demo::server::ThrowawayServer;

use crate::support::{Migration, Servers, connect};

const DOCUMENT: &str = include_str!("../../docs/managed-services.md");

/// A service, by what it calls its roles.
#[derive(Clone, Copy)]
pub struct Service {
    /// As the document's blocks are named.
    pub name: &'static str,
    /// What the service itself sets up on each server, as its superuser.
    provides: &'static str,
    /// Who runs the document's SQL.
    administrator: &'static str,
    /// Who migrates.
    pub role: &'static str,
    /// Who owns the database `app`.
    owner: &'static str,
}

const ADMINISTRATOR: &str = "GRANT pg_monitor, pg_signal_backend TO \"group\" WITH ADMIN OPTION; \
     CREATE ROLE administrator LOGIN CREATEROLE CREATEDB IN ROLE \"group\"";

pub const RDS: Service = Service {
    name: "rds",
    provides: "CREATE ROLE rds_replication; CREATE ROLE rds_superuser IN ROLE rds_replication; ",
    administrator: "administrator",
    role: "walferry",
    owner: "app_owner",
};
pub const CLOUD_SQL: Service =
    Service { name: "cloud-sql", provides: "CREATE ROLE cloudsqlsuperuser CREATEROLE CREATEDB; ", ..RDS };
pub const AZURE: Service =
    Service { name: "azure", provides: "CREATE ROLE azure_pg_admin CREATEROLE CREATEDB; ", ..RDS };
pub const TIMESCALE_CLOUD: Service = Service {
    name: "timescale-cloud",
    provides: "CREATE ROLE tsdbadmin LOGIN CREATEROLE REPLICATION; CREATE DATABASE app OWNER tsdbadmin",
    administrator: "tsdbadmin",
    role: "tsdbadmin",
    owner: "tsdbadmin",
};

impl Service {
    /// A migration of the database `app`, which is empty on both sides, as the role of the service.
    pub async fn migration(&self, servers: &Servers) -> Migration {
        for (server, side) in [(&servers.source, "source"), (&servers.target, "target")] {
            self.provide(server).await;
            let superuser = server.connect("postgres").await.unwrap();
            if side == "source" {
                superuser
                    .batch_execute("CREATE ROLE app_owner; CREATE ROLE app LOGIN IN ROLE app_owner")
                    .await
                    .unwrap();
                if self.owner != self.administrator {
                    superuser.batch_execute("CREATE DATABASE app OWNER app_owner").await.unwrap();
                } else {
                    superuser.batch_execute("GRANT CREATE ON DATABASE app TO app_owner").await.unwrap();
                }
            }
            self.run_block(server, side).await;
            let as_role = connect(&url(server, self.role, "app")).await;
            for forbidden in ["SET session_replication_role = replica", "ALTER SYSTEM SET work_mem = '5MB'"] {
                let refused = as_role.batch_execute(forbidden).await.unwrap_err();
                assert_eq!(refused.code().map(|code| code.code()), Some("42501"), "{forbidden}");
            }
        }
        let mut migration = servers.migration("beside").await;
        migration.source_url = url(&servers.source, self.role, "app");
        migration.target_url = url(&servers.target, self.role, "app");
        migration
    }

    async fn provide(&self, server: &ThrowawayServer) {
        let superuser = server.connect("postgres").await.unwrap();
        for statement in self.provides.split_inclusive(';').filter(|statement| !statement.trim().is_empty()) {
            superuser.batch_execute(statement).await.unwrap();
        }
        if self.administrator == "administrator" {
            let group = self.provides.rsplit("CREATE ROLE ").next().unwrap().split([' ', ';']).next().unwrap();
            superuser.batch_execute(&ADMINISTRATOR.replace("group", group)).await.unwrap();
        }
    }

    /// What the document says, as the administrator; what lets a role replicate, as the service's own server would do it.
    async fn run_block(&self, server: &ThrowawayServer, side: &str) {
        let superuser = server.connect("postgres").await.unwrap();
        let database = if side == "source" || self.administrator == self.role { "app" } else { "postgres" };
        let administrator = connect(&url(server, self.administrator, database)).await;
        for statement in block(self.name, side) {
            let who = if statement.contains(" REPLICATION") { &superuser } else { &administrator };
            let ran = who.batch_execute(&statement).await;
            ran.unwrap_or_else(|error| panic!("{}: {side}: {statement}: {error:?}", self.name));
            if statement.contains("GRANT rds_replication") {
                superuser.batch_execute(&format!("ALTER ROLE {} REPLICATION", self.role)).await.unwrap();
            }
        }
    }
}

/// The statements of the document's block for one side of a service.
fn block(service: &str, side: &str) -> Vec<String> {
    let header = format!("```sql\n-- {service}: {side}\n");
    let (_, after) = DOCUMENT.split_once(&header).unwrap_or_else(|| panic!("the document has no {header}"));
    let (text, _) = after.split_once("```").unwrap();
    let statements = text.split_inclusive(";\n").map(|statement| statement.trim().to_owned());
    statements.filter(|statement| !statement.is_empty()).collect()
}

/// As a role of a server.
pub fn url(server: &ThrowawayServer, role: &str, database: &str) -> String {
    format!("postgres://{role}@127.0.0.1:{}/{database}", server.port())
}

/// A session as the service's superuser in the database `app`.
pub async fn superuser(server: &ThrowawayServer) -> Client {
    server.connect("app").await.unwrap()
}
