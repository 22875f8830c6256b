//! Certificates: the server's, which changes while it runs, and those of clients.

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::io::AsyncWriteExt as _;
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use trunkline::{Config, Server};

use crate::client::{Client, agent};

pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A certificate and its key, as PEM.
    fn issue(&self, common_name: &str) -> (String, String) {
        self.issue_for(common_name, Duration::from_secs(24 * 3600))
    }

    /// The same, good for so long.
    fn issue_for(&self, common_name: &str, lasts: Duration) -> (String, String) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.not_after = (SystemTime::now() + lasts).into();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }
}

fn write(dir: &Path, (certificate, key): (String, String)) {
    fs::write(dir.join("key.pem"), key).unwrap();
    fs::write(dir.join("cert.pem"), certificate).unwrap();
}

pub(crate) fn config(dir: &Path, authority: &Authority) -> Config {
    write(dir, authority.issue("localhost"));
    let mut config = Config { data_dir: dir.join("data"), ..Config::on_free_ports() };
    (config.tls.cert, config.tls.key) = (dir.join("cert.pem"), dir.join("key.pem"));
    config
}

/// An endpoint that trusts `authority`, and shows a certificate if there is one.
pub(crate) fn endpoint(server: &Server, authority: &Authority, own: Option<(String, String)>) -> Endpoint {
    let port = server.addresses().grpc.port();
    let mut tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority.pem())).domain_name("localhost");
    if let Some((certificate, key)) = own {
        tls = tls.identity(Identity::from_pem(certificate, key));
    }
    Endpoint::from_shared(format!("https://127.0.0.1:{port}")).unwrap().tls_config(tls).unwrap()
}

/// A channel to that.
async fn channel(server: &Server, authority: &Authority, own: Option<(String, String)>) -> Result<Channel, Status> {
    let endpoint = endpoint(server, authority, own);
    endpoint.connect().await.map_err(|e| Status::unavailable(e.to_string()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_certificate_is_used_and_open_streams_stay() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (Authority::new("first"), Authority::new("second"));
    let server = Server::start(Config { dev: true, ..config(dir.path(), &first) }).await.unwrap();
    let mut old = Client::connect_over(channel(&server, &first, None).await.unwrap(), agent("old")).await.unwrap();
    assert!(Client::connect(server.addresses().grpc, agent("plain")).await.is_err(), "plain text is refused");
    assert!(channel(&server, &second, None).await.is_err());
    // Half a change is not taken; the whole one is.
    fs::write(dir.path().join("cert.pem"), "no certificate").unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    channel(&server, &first, None).await.unwrap();
    write(dir.path(), second.issue("localhost"));
    let renewed = async {
        loop {
            if let Ok(channel) = channel(&server, &second, None).await {
                return channel;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let renewed = tokio::time::timeout(Duration::from_secs(20), renewed).await.unwrap();
    Client::connect_over(renewed, agent("new")).await.unwrap().barrier().await;
    old.barrier().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clients_certificate_says_who_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (authority, other) = (Authority::new("ours"), Authority::new("another"));
    let mut config = config(dir.path(), &authority);
    config.tls.client_ca = dir.path().join("ca.pem");
    fs::write(&config.tls.client_ca, authority.pem()).unwrap();
    let server = Server::start(config).await.unwrap();
    let connect = async |own: Option<(String, String)>, specifier: &str| {
        let channel = channel(&server, &authority, own).await?;
        Client::connect_over(channel, agent(specifier)).await
    };
    let named = || Some(authority.issue("ag::ws::impl::*"));
    connect(named(), "one").await.unwrap().barrier().await;
    let mismatch = connect(Some(authority.issue("ag::ws::impl::two")), "one").await.err().unwrap();
    assert_eq!(mismatch.code(), Code::PermissionDenied);
    assert!(mismatch.message().contains("certificate confirms ag::ws::impl::two but"), "{}", mismatch.message());
    // Certificates of servers, and patterns of other kinds, are nobody's.
    for name in ["*.example.com", "*", "ag::*::a.example.com", "ag::ws::impl::a?example.com"] {
        let refused = connect(Some(authority.issue(name)), "a.example.com").await.err().unwrap();
        assert_eq!(refused.code(), Code::PermissionDenied, "{name}");
    }
    for nobody in [None, Some(authority.issue("_anonymous"))] {
        assert_eq!(connect(nobody, "one").await.err().unwrap().code(), Code::Unauthenticated);
    }
    assert!(connect(Some(other.issue("ag::ws::impl::one")), "one").await.is_err(), "whom we do not trust");
    // A stream lasts no longer than what opened it.
    let brief = authority.issue_for("ag::ws::impl::brief", Duration::from_secs(5));
    let mut brief = connect(Some(brief), "brief").await.unwrap();
    assert_eq!(brief.end().await, Some(Code::Unauthenticated));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_certificates_are_required_nobody_comes_without() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new("ours");
    let mut config = Config { dev: true, ..config(dir.path(), &authority) };
    config.tls.client_ca = dir.path().join("ca.pem");
    config.tls.require_client_cert = true;
    fs::write(&config.tls.client_ca, authority.pem()).unwrap();
    let server = Server::start(config).await.unwrap();
    // TLS 1.3: the client learns that it was refused with its first request.
    if let Ok(channel) = channel(&server, &authority, None).await {
        assert!(Client::connect_over(channel, agent("one")).await.is_err());
    }
    let own = Some(authority.issue("_anonymous"));
    Client::connect_over(channel(&server, &authority, own).await.unwrap(), agent("one")).await.unwrap();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_handshakes_block_no_other_client() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new("ours");
    let server = Server::start(Config { dev: true, ..config(dir.path(), &authority) }).await.unwrap();
    let addresses = server.addresses();
    let mut silent = Vec::new();
    for n in 0..600 {
        let address = if n % 2 == 0 { addresses.grpc } else { addresses.http };
        let mut one = tokio::net::TcpStream::connect(address).await.unwrap();
        // Every second one of each listener begins a handshake.
        one.write_all(if n % 4 < 2 { &[0x16] } else { &[] }).await.unwrap();
        silent.push(one);
    }
    let begun = std::time::Instant::now();
    let over = channel(&server, &authority, None).await.unwrap();
    Client::connect_over(over, agent("one")).await.unwrap().barrier().await;
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "a handshake may take 10 s, and nobody waits for those of others"
    );
    server.stop().await;
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named_before_anything_is_bound() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new("ours");
    let mut wrong = config(dir.path(), &authority);
    wrong.tls.key = dir.path().join("missing.pem");
    let error = Server::start(wrong).await.err().unwrap().to_string();
    assert!(error.contains("missing.pem"), "{error}");
    let mut half = config(dir.path(), &authority);
    half.tls.key = "".into();
    assert!(Server::start(half).await.err().unwrap().to_string().contains("belong together"));
}
