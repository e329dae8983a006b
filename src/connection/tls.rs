//! TLS as libpq's sslmode means it, by rustls with the `ring` provider.
//!
//! Certificate files are read at every connect, so that renewed ones are taken without a restart.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::version::{TLS12, TLS13};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme, SupportedProtocolVersion,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use super::certificate;
use super::environment::Environment;
use super::spec::bad_value;
use super::stream::Stream;
use crate::error::{Error, ErrorKind, Result};

/// SSLRequest: its length and its code ("Message Formats" in the manual).
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xD2, 0x16, 0x2F];

type Versions = &'static [&'static SupportedProtocolVersion];

static ANY_VERSION: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];
static ONLY_TLS12: [&SupportedProtocolVersion; 1] = [&TLS12];
static ONLY_TLS13: [&SupportedProtocolVersion; 1] = [&TLS13];

/// `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SslMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// Everything that says how to speak TLS with a server.
#[derive(Clone, Debug)]
pub(super) struct TlsSettings {
    pub(super) mode: SslMode,
    roots: Roots,
    /// Files with our certificate and its key.
    client: Option<(PathBuf, PathBuf)>,
    /// Whether the server learns the host's name before the session is encrypted.
    name_is_sent: bool,
    versions: Versions,
}

/// Where the certificates are that a server's has to be signed by.
#[derive(Clone, Debug)]
enum Roots {
    /// No file was named, and the usual one is not known.
    None,
    /// `sslrootcert=system`.
    System,
    /// A file that was named.
    File(PathBuf),
    /// `~/.postgresql/root.crt`, which need not be there.
    Usual(PathBuf),
}

/// What about a server's certificate is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    Nothing,
    Chain,
    ChainAndName,
}

/// Why there is no TLS session.
pub(super) enum TlsFailure {
    /// The connection broke, or the settings cannot be used.
    Broken(Error),
    /// One side refused the other; without TLS it may work.
    Refused(Error),
}

impl From<Error> for TlsFailure {
    fn from(error: Error) -> TlsFailure {
        TlsFailure::Broken(error)
    }
}

impl TlsSettings {
    /// Reads the parameters that begin with `ssl`.
    pub(super) fn from_parameters(
        parameters: &BTreeMap<&'static str, String>,
        surroundings: &Environment,
    ) -> Result<TlsSettings> {
        let value = |name: &str| parameters.get(name).map(String::as_str);
        let mode = match value("sslmode") {
            None if value("sslrootcert") == Some("system") => SslMode::VerifyFull,
            None | Some("prefer") => SslMode::Prefer,
            Some("disable") => SslMode::Disable,
            Some("allow") => SslMode::Allow,
            Some("require") => SslMode::Require,
            Some("verify-ca") => SslMode::VerifyCa,
            Some("verify-full") => SslMode::VerifyFull,
            Some(_) => return Err(bad_value("sslmode", "disable, allow, prefer, require, verify-ca or verify-full")),
        };
        let usual = |name: &str| surroundings.in_home(&format!(".postgresql/{name}"));
        let roots = match value("sslrootcert") {
            // The system's authorities sign for everybody, so without the name their word proves nothing.
            Some("system") if mode != SslMode::VerifyFull => {
                return Err(bad_value("sslmode", "verify-full, since sslrootcert is system"));
            }
            Some("system") => Roots::System,
            Some(path) => Roots::File(path.into()),
            None => usual("root.crt").map_or(Roots::None, Roots::Usual),
        };
        let certificate = match value("sslcertmode") {
            Some("disable") => None,
            None | Some("allow") => {
                let usual = || usual("postgresql.crt").filter(|path| path.exists());
                value("sslcert").map(PathBuf::from).or_else(usual)
            }
            Some(_) => return Err(bad_value("sslcertmode", "disable or allow (require is not supported)")),
        };
        let key = value("sslkey").map(PathBuf::from).or_else(|| usual("postgresql.key"));
        let name_is_sent = match value("sslsni") {
            None | Some("1") => true,
            Some("0") => false,
            Some(_) => return Err(bad_value("sslsni", "0 or 1")),
        };
        let version = |name: &'static str| match value(name) {
            None => Ok(None),
            Some("TLSv1" | "TLSv1.1") => Ok(Some(1)),
            Some("TLSv1.2") => Ok(Some(2)),
            Some("TLSv1.3") => Ok(Some(3)),
            Some(_) => Err(bad_value(name, "TLSv1.2 or TLSv1.3")),
        };
        let range = (version("ssl_min_protocol_version")?, version("ssl_max_protocol_version")?);
        let versions: Versions = match (range.0.unwrap_or(2), range.1.unwrap_or(3)) {
            (1 | 2, 3) => &ANY_VERSION,
            (1 | 2, 2) => &ONLY_TLS12,
            (3, 3) => &ONLY_TLS13,
            _ => return Err(bad_value("ssl_max_protocol_version", "TLSv1.2 or TLSv1.3, and not below the minimum")),
        };
        Ok(TlsSettings { mode, roots, client: certificate.zip(key), name_is_sent, versions })
    }

    /// Asks the server for TLS and shakes hands; with sslmode=prefer and a server that has none, the stream stays as
    /// it is.
    pub(super) async fn negotiate(&self, mut stream: Stream, host: &str) -> Result<Stream, TlsFailure> {
        // Before the server is asked, so that a wrong file is the message that is seen.
        let connector = TlsConnector::from(Arc::new(self.configuration(host)?));
        let broken = |error: io::Error| {
            Error::new(ErrorKind::Transient, format!("the connection broke while TLS was being negotiated: {error}"))
        };
        stream.write_all(&SSL_REQUEST).await.map_err(broken)?;
        // Exactly one byte: what somebody in between may have slipped in after it meets the handshake, and fails it.
        match stream.read_u8().await.map_err(broken)? {
            b'S' => {}
            b'N' if self.mode == SslMode::Prefer => return Ok(stream),
            b'N' => {
                let error = Error::new(ErrorKind::Usage, "the server does not offer TLS, and sslmode asks for it");
                return Err(TlsFailure::Refused(
                    error.hint("set ssl = on at the server, or sslmode=disable where the network can be trusted"),
                ));
            }
            _ => {
                return Err(
                    Error::new(ErrorKind::Transient, "the server answered the request for TLS with an error").into()
                );
            }
        }
        let no_tcp = || Error::new(ErrorKind::Other, "TLS goes over TCP only");
        let tcp = stream.into_tcp().ok_or_else(no_tcp)?;
        let name = match ServerName::try_from(host.to_owned()) {
            Ok(name) => name,
            // Without a name there is nothing to send or to check; `configuration` has seen that nothing has to be.
            Err(_) => ServerName::from(tcp.peer_addr().map_err(broken)?.ip()),
        };
        let session = connector.connect(name, tcp).await.map_err(|error| match error.get_ref() {
            Some(inner) if inner.is::<rustls::Error>() => TlsFailure::Refused(explained(&error)),
            _ => TlsFailure::Broken(broken(error)),
        })?;
        let certificates = session.get_ref().1.peer_certificates().unwrap_or_default();
        let end_point = certificates.first().and_then(|certificate| certificate::end_point_hash(certificate));
        Ok(Stream::secured(session, end_point))
    }

    /// Reads the files and says what is to be checked.
    fn configuration(&self, host: &str) -> Result<ClientConfig> {
        let provider = Arc::new(ring::default_provider());
        let check = match (self.mode, &self.roots) {
            (SslMode::VerifyFull, _) => Check::ChainAndName,
            (SslMode::VerifyCa, _) => Check::Chain,
            // As in libpq, a root certificate makes `require` check the chain.
            (SslMode::Require, Roots::File(_)) => Check::Chain,
            (SslMode::Require, Roots::Usual(path)) if path.exists() => Check::Chain,
            _ => Check::Nothing,
        };
        if check == Check::ChainAndName && ServerName::try_from(host).is_err() {
            return Err(Error::new(
                ErrorKind::Usage,
                "sslmode=verify-full needs a host name, and there is none to check",
            ));
        }
        let mut trusted = Vec::new();
        let mut roots = RootCertStore::empty();
        if check != Check::Nothing {
            trusted = self.trusted()?;
            let (added, _) = roots.add_parsable_certificates(trusted.iter().cloned());
            if added == 0 {
                return Err(Error::new(ErrorKind::Usage, "no certificate in sslrootcert can be used"));
            }
        }
        let algorithms = provider.signature_verification_algorithms;
        let verifier = Verifier { check, roots, trusted, algorithms, host: host.to_owned() };
        let unusable =
            |error: rustls::Error| Error::new(ErrorKind::Usage, format!("the TLS settings cannot be used: {error}"));
        let builder = ClientConfig::builder_with_provider(Arc::<CryptoProvider>::clone(&provider))
            .with_protocol_versions(self.versions)
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut configuration = match &self.client {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = certificates(certificate, "sslcert")?;
                builder.with_client_auth_cert(chain, private_key(key)?).map_err(unusable)?
            }
        };
        configuration.enable_sni = self.name_is_sent;
        Ok(configuration)
    }

    fn trusted(&self) -> Result<Vec<CertificateDer<'static>>> {
        match &self.roots {
            Roots::System => Ok(rustls_native_certs::load_native_certs().certs),
            Roots::File(path) | Roots::Usual(path) => certificates(path, "sslrootcert"),
            Roots::None => Err(Error::new(ErrorKind::Usage, "sslmode asks for a check, and no sslrootcert is given")),
        }
    }
}

fn certificates(path: &Path, parameter: &str) -> Result<Vec<CertificateDer<'static>>> {
    let failed = |error: &dyn std::fmt::Display| {
        let message = format!("reading the certificates in {} ({parameter}): {error}", path.display());
        Error::new(ErrorKind::Usage, message).hint("the file has to hold certificates in PEM form")
    };
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(|certificates| certificates.collect::<std::result::Result<_, _>>())
        .map_err(|error| failed(&error))?;
    if found.is_empty() { Err(failed(&"there is none")) } else { Ok(found) }
}

/// A key that others can read is refused, as libpq does; one that belongs to root may be readable by its group.
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let failed = |problem: String| {
        Error::new(ErrorKind::Usage, format!("reading the private key {} (sslkey): {problem}", path.display())).hint(
            "the file has to hold one unencrypted key in PEM form, with mode 0600 (openssl pkey removes a passphrase)",
        )
    };
    let metadata = std::fs::metadata(path).map_err(|error| failed(error.to_string()))?;
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.mode() & forbidden != 0 {
        return Err(failed("other users can read it".to_owned()));
    }
    PrivateKeyDer::from_pem_file(path).map_err(|error| failed(error.to_string()))
}

fn explained(error: &io::Error) -> Error {
    Error::new(ErrorKind::Other, format!("no TLS session with the server: {error}")).hint(
        "compare sslrootcert with the authority that signed the server's certificate, and the host with the names in it",
    )
}

/// Checks what sslmode says, not what rustls would by itself.
#[derive(Debug)]
struct Verifier {
    check: Check,
    roots: RootCertStore,
    /// The certificates in `roots`, as they stand in the file.
    trusted: Vec<CertificateDer<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
    host: String,
}

impl Verifier {
    /// A certificate whose extensions rustls cannot read (X.509 version 1) proves nothing, and where nothing has to
    /// be proven it may be used.
    fn unless_unread(
        &self,
        outcome: Result<HandshakeSignatureValid, rustls::Error>,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        match outcome {
            Err(rustls::Error::InvalidCertificate(CertificateError::BadEncoding | CertificateError::Other(_)))
                if self.check == Check::Nothing =>
            {
                Ok(HandshakeSignatureValid::assertion())
            }
            outcome => outcome,
        }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.check == Check::Nothing {
            return Ok(ServerCertVerified::assertion());
        }
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.algorithms.all;
        match verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms) {
            Err(rustls::Error::InvalidCertificate(
                error @ (CertificateError::ExpiredContext { .. } | CertificateError::NotValidYetContext { .. }),
            )) => return Err(error.into()),
            // A self-signed certificate can stand in sslrootcert itself; rustls refuses it where it calls itself an
            // authority. (Its dates are checked before that.)
            Err(_) if self.trusted.iter().any(|trusted| trusted == end_entity) => {}
            outcome => outcome?,
        }
        if self.check == Check::ChainAndName {
            match verify_server_name(&parsed, server_name) {
                // Without any alternative name the common name counts, as in libpq.
                Err(rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext {
                    presented, ..
                })) if presented.is_empty()
                    && certificate::common_name(end_entity)
                        .is_some_and(|name| certificate::names_host(&name, &self.host)) => {}
                outcome => outcome?,
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.unless_unread(verify_tls12_signature(message, certificate, signature, &self.algorithms))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.unless_unread(verify_tls13_signature(message, certificate, signature, &self.algorithms))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
