//! A native subscription to the same database, which can rest while a backlog grows.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use walferry::error::{Context, Error, ErrorKind, Result};

use crate::engine::PATIENCE;
use crate::setting::Setting;

/// PostgreSQL's own logical replication, with the defaults of `CREATE SUBSCRIPTION`.
pub struct Native {
    target: Client,
    source: Client,
    name: String,
}

impl Native {
    /// Makes the publication and the subscription, and waits until the tables are copied.
    pub async fn begin(setting: &Setting, database: &str, target_database: &str) -> Result<Native> {
        let (from, to) = (setting.source.url_for(database), setting.target.url_for(target_database));
        setting.new_database(&setting.target, target_database).await?;
        setting.copy_schema(&from, &to, "").await?;
        let source = setting.source.connect(database).await?;
        let target = setting.target.connect(target_database).await?;
        let name = format!("native_{database}");
        source.batch_execute(&format!("CREATE PUBLICATION {name} FOR ALL TABLES")).await?;
        target
            .batch_execute(&format!("CREATE SUBSCRIPTION {name} CONNECTION '{from}' PUBLICATION {name}"))
            .await
            .context(|| "making the native subscription".into())?;
        let native = Native { target, source, name };
        native
            .until(
                "the subscription has copied its tables",
                &native.target,
                "SELECT NOT EXISTS (SELECT FROM pg_subscription_rel WHERE srsubstate <> 'r')",
            )
            .await?;
        Ok(native)
    }

    /// Stops it; its slot keeps what comes.
    pub async fn rest(&self) -> Result<()> {
        self.target.batch_execute(&format!("ALTER SUBSCRIPTION {} DISABLE", self.name)).await?;
        let gone = format!("SELECT NOT active FROM pg_replication_slots WHERE slot_name = '{}'", self.name);
        self.until("the subscription's slot is free", &self.source, &gone).await
    }

    /// Lets it go on.
    pub async fn go_on(&self) -> Result<()> {
        self.target.batch_execute(&format!("ALTER SUBSCRIPTION {} ENABLE", self.name)).await.map_err(Error::from)
    }

    /// Removes it, with its slot and its publication.
    pub async fn end(self) -> Result<()> {
        self.target.batch_execute(&format!("DROP SUBSCRIPTION {}", self.name)).await?;
        self.source.batch_execute(&format!("DROP PUBLICATION {}", self.name)).await.map_err(Error::from)
    }

    async fn until(&self, what: &str, client: &Client, question: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !client.query_one(question, &[]).await?.get::<_, bool>(0) {
            if Instant::now() > deadline {
                return Err(Error::new(ErrorKind::Other, format!("waited in vain until {what}")));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}
