//! B8: the target 20 ms away, behind a proxy that holds back every byte for half of that in either direction.

use std::net::Ipv4Addr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use walferry::error::{Context, Result};

use crate::backlog;
use crate::draining::{Drain, Drained, From};
use crate::engine::Engine;
use crate::results::{Bar, Results, Row, Sample};
use crate::setting::Setting;

/// There and back again.
const ROUND_TRIP: Duration = Duration::from_millis(20);
/// What is on its way at once in one direction, in pieces of up to 64 KiB: more than any rate here fills in 10 ms.
const PIECES: usize = 512;
const PIECE_BYTES: usize = 64 << 10;

/// A port that leads to another, slowly.
struct Proxy {
    port: u16,
    listener: JoinHandle<()>,
}

impl Proxy {
    async fn start(to: u16, delay: Duration) -> Result<Proxy> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context(|| "opening the proxy's port".into())?;
        let port = listener.local_addr()?.port();
        let listener = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let Ok(far) = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await else { return };
                    let _ = (near.set_nodelay(true), far.set_nodelay(true));
                    let (near_read, near_write) = near.into_split();
                    let (far_read, far_write) = far.into_split();
                    tokio::join!(carry(near_read, far_write, delay), carry(far_read, near_write, delay));
                });
            }
        });
        Ok(Proxy { port, listener })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

/// One direction: each piece leaves when its time has come; nothing is slowed besides.
async fn carry(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, delay: Duration) {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES);
    let reading = async move {
        loop {
            let mut piece = Vec::with_capacity(PIECE_BYTES);
            match from.read_buf(&mut piece).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {
                    if sender.send((Instant::now() + delay, piece)).await.is_err() {
                        break;
                    }
                }
            }
        }
    };
    let writing = async move {
        while let Some((due, piece)) = receiver.recv().await {
            tokio::time::sleep_until(due).await;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}

/// Copy and drain, near and far in turns.
pub async fn away(setting: &Setting, results: &mut Results) -> Result<()> {
    // Without delay the same proxy is in between, so that what it costs itself is on both sides.
    let near = Proxy::start(setting.target.port(), Duration::ZERO).await?;
    let far = Proxy::start(setting.target.port(), ROUND_TRIP / 2).await?;
    copy(setting, &near, &far, results).await?;
    drain(setting, &near, &far, results).await
}

async fn copy(setting: &Setting, near: &Proxy, far: &Proxy, results: &mut Results) -> Result<()> {
    let scale = setting.options.size(50, 10);
    backlog::tpcb(scale, 0).prepare(setting, "far").await?;
    let (mut locally, mut away) = (Sample::default(), Sample::default());
    for _ in 0..setting.options.rounds() {
        for (proxy, times) in [(near, &mut locally), (far, &mut away)] {
            setting.new_database(&setting.target, "ours_far").await?;
            setting.settle().await?;
            let target = format!("postgres://postgres@127.0.0.1:{}/ours_far", proxy.port);
            let mut engine = Engine::new(setting, "far", setting.source.url_for("far"), target)?;
            let begun = Instant::now();
            engine.start()?;
            engine.following().await?;
            times.0.push(begun.elapsed().as_secs_f64());
            engine.clean().await?;
        }
    }
    let case = format!("full clone, pgbench scale {scale}, target {} ms away", ROUND_TRIP.as_millis());
    results.add(Row::of_times("B8", &case, &away, ("the same at 0 ms", &locally), Bar::Speed(0.8)));
    setting.drop_database(&setting.target, "ours_far").await?;
    setting.drop_database(&setting.source, "far").await
}

async fn drain(setting: &Setting, near: &Proxy, far: &Proxy, results: &mut Results) -> Result<()> {
    let workload = backlog::inserts(setting.options.size(20_000, 4_000));
    let mut times = Vec::new();
    for proxy in [near, far] {
        let mut drain = Drain::begin(setting, &workload, Some(proxy.port), false).await?;
        let mut drained = Drained::default();
        for _ in 0..setting.options.rounds() {
            drain.round(From::Queue, true, &mut drained).await?;
        }
        drain.end().await?;
        times.push(drained.ours);
    }
    if let [locally, away] = &times[..] {
        let case = format!("drain from the queue, {}, target {} ms away", workload.case, ROUND_TRIP.as_millis());
        results.add(Row::of_times("B8", &case, away, ("the same at 0 ms", locally), Bar::Speed(0.8)));
    }
    Ok(())
}
