//! TLS, and certificates of clients: what is configured, loaded, loaded again when its files change, and accepted.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
    version::TLS13,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;
use trunkline_core::{
    Error, Kind,
    identity::{Identity, is_bound_to},
};

use x509_cert::{
    Certificate,
    der::{Decode as _, oid::ObjectIdentifier},
};

use crate::config::{ConfigError, TlsConfig};

/// How often the files are looked at.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);

/// `id-at-commonName` of RFC 5280.
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// The common name of a certificate that is good for the transport and says nothing of who uses it. A published name.
const ANONYMOUS: &str = "_anonymous";

/// The certificates in force. Clones share them.
#[derive(Clone)]
pub(crate) struct Tls {
    config: TlsConfig,
    current: Arc<Mutex<Arc<ServerConfig>>>,
}

impl Tls {
    /// Reads the files, if TLS is configured.
    pub(crate) fn load(config: &TlsConfig) -> Result<Option<Self>, ConfigError> {
        let given = [&config.cert, &config.key].map(|path| !path.as_os_str().is_empty());
        match given {
            [true, true] => {}
            [false, false] if config.client_ca.as_os_str().is_empty() => return Ok(None),
            _ => return Err(ConfigError::Content("tls: cert and key belong together, and client_ca to both".into())),
        }
        let current = Arc::new(Mutex::new(Arc::new(server_config(config)?)));
        Ok(Some(Self { config: config.clone(), current }))
    }

    /// Takes new files when they change; keeps what it has while they cannot be used.
    pub(crate) async fn watch(self, stop: CancellationToken) {
        let mut seen = self.changed_at();
        let mut ticks = tokio::time::interval(RELOAD_INTERVAL);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            let now = self.changed_at();
            if now != seen {
                self.reload();
                seen = now;
            }
        }
    }

    fn reload(&self) {
        match server_config(&self.config) {
            Ok(config) => {
                *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
                tracing::info!("certificates loaded again");
            }
            Err(error) => tracing::error!(%error, "changed certificates cannot be used; the old ones stay in force"),
        }
    }

    fn changed_at(&self) -> [Option<SystemTime>; 3] {
        let TlsConfig { cert, key, client_ca, .. } = &self.config;
        [cert, key, client_ca].map(|path| fs::metadata(path).and_then(|meta| meta.modified()).ok())
    }

    /// The connection behind a handshake; nothing if that fails: there is nobody to tell. `protocols` in the order of
    /// preference. It takes as long as the client likes.
    pub(crate) async fn handshake(&self, stream: TcpStream, protocols: &[&str]) -> Option<TlsStream<TcpStream>> {
        self.acceptor(protocols).accept(stream).await.ok()
    }

    fn acceptor(&self, protocols: &[&str]) -> TlsAcceptor {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut config = (*current).clone();
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        Arc::new(config).into()
    }
}

/// TLS 1.3 only, as the published server.
fn server_config(config: &TlsConfig) -> Result<ServerConfig, ConfigError> {
    let wrong =
        |path: &Path, why: &dyn std::fmt::Display| ConfigError::Content(format!("tls: {}: {why}", path.display()));
    let certificates = |path: &Path| {
        let all = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        match all {
            Ok(all) if all.is_empty() => Err(wrong(path, &"no certificate in it")),
            Ok(all) => Ok(all),
            Err(e) => Err(wrong(path, &e)),
        }
    };
    let chain = certificates(&config.cert)?;
    let key = PrivateKeyDer::from_pem_file(&config.key).map_err(|e| wrong(&config.key, &e))?;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[&TLS13]);
    let builder = builder.map_err(|e| ConfigError::Content(format!("tls: {e}")))?;
    let builder = if config.client_ca.as_os_str().is_empty() {
        builder.with_no_client_auth()
    } else {
        let mut roots = RootCertStore::empty();
        for root in certificates(&config.client_ca)? {
            roots.add(root).map_err(|e| wrong(&config.client_ca, &e))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        let verifier = if config.require_client_cert { verifier } else { verifier.allow_unauthenticated() };
        builder.with_client_cert_verifier(verifier.build().map_err(|e| wrong(&config.client_ca, &e))?)
    };
    builder.with_single_cert(chain, key).map_err(|e| wrong(&config.cert, &e))
}

/// Whom a client's certificate is for: an identity or how identities begin, such as `ag::prod::chat::*`, and until when, in
/// Unix seconds; nobody in particular for an anonymous one.
pub(crate) fn holder(certificate: &CertificateDer<'_>) -> Result<Option<(String, i64)>, Error> {
    let invalid = || Error::new(Kind::Unauthenticated, "ERR_UNAUTHENTICATED", "invalid client certificate");
    let Certificate { tbs_certificate: parsed, .. } = Certificate::from_der(certificate).map_err(|_| invalid())?;
    let mut parts = parsed.subject.0.iter().flat_map(|part| part.0.iter());
    let name = parts.find(|part| part.oid == COMMON_NAME).ok_or_else(invalid)?;
    let name = std::str::from_utf8(name.value.value()).map_err(|_| invalid())?;
    let until = parsed.validity.not_after.to_unix_duration().as_secs();
    Ok((name != ANONYMOUS).then(|| (name.to_owned(), i64::try_from(until).unwrap_or(i64::MAX))))
}

/// Whether a certificate for `holder` is good for the identity that its client claims.
pub(crate) fn check_holder(holder: &str, claimed: &Identity) -> Result<(), Error> {
    if is_bound_to(holder, claimed) {
        return Ok(());
    }
    let message = format!("identity mismatch: certificate confirms {holder} but InitConnection provides {claimed}");
    Err(Error::new(Kind::Denied, "ERR_PERMISSION_DENIED", message))
}
