//! A TCP proxy between walferry and a server, which can do to connections whatever networks do.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What is done to a connection that ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Both sides are told.
    Cut,
    /// The server is told; walferry's side stays open and silent for so long.
    ServerToldOnly(Duration),
    /// walferry is told; the server's side stays open and silent for so long.
    ClientToldOnly(Duration),
}

/// How bytes flow.
#[derive(Default)]
struct Flow {
    to_server_frozen: AtomicBool,
    to_client_frozen: AtomicBool,
    slow: AtomicBool,
}

struct Link {
    flow: Flow,
    end: watch::Sender<Option<End>>,
}

struct Shared {
    server_port: u16,
    /// Applies to every connection, those to come too.
    weather: Flow,
    refusing: AtomicBool,
    links: Mutex<BTreeMap<u64, Arc<Link>>>,
    next: AtomicU64,
}

/// A proxy on a port of its own; gone when dropped.
pub struct Proxy {
    pub port: u16,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    pub async fn to(server_port: u16) -> std::io::Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            server_port,
            weather: Flow::default(),
            refusing: AtomicBool::new(false),
            links: Mutex::default(),
            next: AtomicU64::new(0),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Proxy { port, shared, accepting })
    }

    /// Ends every connection, or one in `one_in`. Answers how many.
    pub fn end(&self, end: End, one_in: u64, mut chosen: impl FnMut(u64) -> bool) -> usize {
        let links = self.shared.links.lock().unwrap();
        let these: Vec<_> = links.values().filter(|_| one_in <= 1 || chosen(one_in)).collect();
        for link in &these {
            link.end.send_replace(Some(end));
        }
        these.len()
    }

    /// How many there are.
    pub fn connections(&self) -> usize {
        self.shared.links.lock().unwrap().len()
    }

    /// Holds all bytes of a direction back, or lets them go on.
    pub fn freeze(&self, to_server: bool, to_client: bool) {
        self.shared.weather.to_server_frozen.store(to_server, Ordering::Relaxed);
        self.shared.weather.to_client_frozen.store(to_client, Ordering::Relaxed);
    }

    /// Holds back what goes over the connections of this moment only; new ones are not touched.
    pub fn freeze_present(&self, frozen: bool, mut chosen: impl FnMut() -> bool) -> usize {
        let links = self.shared.links.lock().unwrap();
        let these: Vec<_> = links.values().filter(|_| !frozen || chosen()).collect();
        for link in &these {
            link.flow.to_server_frozen.store(frozen, Ordering::Relaxed);
            link.flow.to_client_frozen.store(frozen, Ordering::Relaxed);
        }
        these.len()
    }

    pub fn slow(&self, slow: bool) {
        self.shared.weather.slow.store(slow, Ordering::Relaxed);
    }

    /// Closes new connections at once.
    pub fn refuse(&self, refusing: bool) {
        self.shared.refusing.store(refusing, Ordering::Relaxed);
    }

    /// As a network should be. What is half open ends at once.
    pub fn heal(&self) {
        for link in self.shared.links.lock().unwrap().values().filter(|link| link.end.borrow().is_some()) {
            link.end.send_replace(Some(End::Cut));
        }
        self.freeze(false, false);
        self.freeze_present(false, || true);
        self.slow(false);
        self.refuse(false);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.end(End::Cut, 1, |_| true);
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((client, _)) = listener.accept().await else { continue };
        if shared.refusing.load(Ordering::Relaxed) {
            continue;
        }
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let number = shared.next.fetch_add(1, Ordering::Relaxed);
            let (end, ended) = watch::channel(None);
            let link = Arc::new(Link { flow: Flow::default(), end });
            shared.links.lock().unwrap().insert(number, Arc::clone(&link));
            connect(client, &shared, &link, ended).await;
            shared.links.lock().unwrap().remove(&number);
        });
    }
}

async fn connect(mut client: TcpStream, shared: &Shared, link: &Link, mut ended: watch::Receiver<Option<End>>) {
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", shared.server_port)).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let end = {
        let (mut from_client, mut to_client) = client.split();
        let (mut from_server, mut to_server) = server.split();
        tokio::select! {
            () = pump(&mut from_client, &mut to_server, shared, link, |flow| &flow.to_server_frozen) => End::Cut,
            () = pump(&mut from_server, &mut to_client, shared, link, |flow| &flow.to_client_frozen) => End::Cut,
            end = ended.wait_for(Option::is_some) => end.map_or(End::Cut, |end| end.unwrap_or(End::Cut)),
        }
    };
    match end {
        End::Cut => {}
        End::ServerToldOnly(time) => {
            drop(server);
            half_open(time, &mut ended).await;
        }
        End::ClientToldOnly(time) => {
            drop(client);
            half_open(time, &mut ended).await;
        }
    }
}

/// The other side stays open for so long, unless the connection is cut meanwhile.
async fn half_open(time: Duration, ended: &mut watch::Receiver<Option<End>>) {
    let _ = tokio::time::timeout(time, ended.wait_for(|end| *end == Some(End::Cut))).await;
}

async fn pump(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    shared: &Shared,
    link: &Link,
    frozen: impl Fn(&Flow) -> &AtomicBool,
) {
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let slow = shared.weather.slow.load(Ordering::Relaxed) || link.flow.slow.load(Ordering::Relaxed);
        let limit = if slow { 2048 } else { buffer.len() };
        let Ok(count @ 1..) = from.read(&mut buffer[..limit]).await else { return };
        while frozen(&shared.weather).load(Ordering::Relaxed) || frozen(&link.flow).load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if slow {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
