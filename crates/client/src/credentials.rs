//! What a client shows to be let in, and how it trusts the server.

use std::{collections::HashMap, fmt, path::Path};

use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use crate::error::{Error, Result};

/// What a client shows to be let in. Several can be combined; what they say is never printed.
///
/// ```
/// use trunkline_client::Credentials;
/// let credentials = Credentials::api_key("tk_1").tenant("acme");
/// assert_eq!(format!("{credentials:?}"), "Credentials [\"x-api-key\", \"x-tenant-id\"]");
/// ```
#[derive(Clone, Default)]
pub struct Credentials(HashMap<String, String>);

impl Credentials {
    /// None: for a server that admits anybody, such as one with `--dev`.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// An API key: `x-api-key`.
    #[must_use]
    pub fn api_key(key: impl Into<String>) -> Self {
        Self::none().with("x-api-key", key)
    }

    /// A JSON web token: `authorization: Bearer …`.
    #[must_use]
    pub fn bearer(token: impl fmt::Display) -> Self {
        Self::none().with("authorization", format!("Bearer {token}"))
    }

    /// The token that a started agent or a task's worker was given: `token`.
    #[must_use]
    pub fn task_token(token: impl Into<String>) -> Self {
        Self::none().with("token", token)
    }

    /// Together with a tenant: `x-tenant-id`.
    #[must_use]
    pub fn tenant(self, id: impl Into<String>) -> Self {
        self.with("x-tenant-id", id)
    }

    /// Any other, by the name that the server knows it by.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.0.insert(name.into(), value.into());
        self
    }

    /// These and others; the others win where both have something to say.
    #[must_use]
    pub fn and(mut self, others: Self) -> Self {
        self.0.extend(others.0);
        self
    }

    pub(crate) fn map(&self) -> &HashMap<String, String> {
        &self.0
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names: Vec<_> = self.0.keys().collect();
        names.sort();
        write!(f, "Credentials {names:?}")
    }
}

/// How the server is trusted, and what certificate the client shows. PEM throughout.
///
/// ```no_run
/// use trunkline_client::Tls;
/// let tls = Tls::new().root_file("ca.pem")?.client_files("client.pem", "client-key.pem")?;
/// # Ok::<(), trunkline_client::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct Tls {
    roots: Option<Vec<u8>>,
    client: Option<(Vec<u8>, Vec<u8>)>,
    server_name: Option<String>,
}

impl Tls {
    /// The roots that the system trusts, and no certificate of the client's own.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts these roots, and no others.
    #[must_use]
    pub fn root_pem(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.roots = Some(pem.into());
        self
    }

    /// As [`Tls::root_pem`], from a file.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn root_file(self, path: impl AsRef<Path>) -> Result<Self> {
        Ok(self.root_pem(read(path.as_ref())?))
    }

    /// Shows a certificate to the server (mTLS).
    #[must_use]
    pub fn client_pem(mut self, certificate: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.client = Some((certificate.into(), key.into()));
        self
    }

    /// As [`Tls::client_pem`], from files.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn client_files(self, certificate: impl AsRef<Path>, key: impl AsRef<Path>) -> Result<Self> {
        Ok(self.client_pem(read(certificate.as_ref())?, read(key.as_ref())?))
    }

    /// Expects this name in the server's certificate, in place of the address's.
    #[must_use]
    pub fn server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }

    /// What the environment says, if it says that TLS is to be used: `AETHER_TLS_ENABLED` (`true`, `1`, `yes`), or a root in
    /// `AETHER_TLS_CA_CERT`; `AETHER_TLS_CLIENT_CERT` and `AETHER_TLS_CLIENT_KEY` go with it. A value is a file's path if there
    /// is such a file, and PEM otherwise, whose lost line breaks are put back. `enabled` decides against all of it.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) for a certificate without its key, or the other way round.
    pub fn from_env(enabled: Option<bool>) -> Result<Option<Self>> {
        Self::from_vars(enabled, |name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn from_vars(enabled: Option<bool>, var: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let root = var("AETHER_TLS_CA_CERT");
        let said = var("AETHER_TLS_ENABLED").map(|value| matches!(value.to_lowercase().as_str(), "true" | "1" | "yes"));
        if !enabled.or(said).unwrap_or(root.is_some()) {
            return Ok(None);
        }
        let mut tls = Self::new();
        if let Some(root) = root {
            tls = tls.root_pem(pem(&root)?);
        }
        match (var("AETHER_TLS_CLIENT_CERT"), var("AETHER_TLS_CLIENT_KEY")) {
            (Some(certificate), Some(key)) => tls = tls.client_pem(pem(&certificate)?, pem(&key)?),
            (None, None) => {}
            _ => return Err(Error::invalid("a client's certificate and its key go together: one of them is missing")),
        }
        Ok(Some(tls))
    }

    pub(crate) fn config(&self) -> ClientTlsConfig {
        let config = match &self.roots {
            Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        let config = match &self.client {
            Some((certificate, key)) => config.identity(Identity::from_pem(certificate, key)),
            None => config,
        };
        match &self.server_name {
            Some(name) => config.domain_name(name),
            None => config,
        }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (own_roots, client) = (self.roots.is_some(), self.client.is_some());
        write!(f, "Tls {{ own roots: {own_roots}, client certificate: {client}, server name: {:?} }}", self.server_name)
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::invalid(format!("cannot read {}: {e}", path.display())).with_source(e))
}

/// A file's content, or the value itself.
fn pem(value: &str) -> Result<Vec<u8>> {
    if Path::new(value).is_file() { read(Path::new(value)) } else { Ok(repair(value).into_bytes()) }
}

/// Puts line breaks back into PEM that went through an environment variable: literal `\n`, spaces in their place, or
/// none at all.
fn repair(value: &str) -> String {
    let value = value.replace("\\n", "\n");
    if value.trim().contains('\n') {
        return value;
    }
    let mut repaired = String::new();
    let mut rest = value.trim();
    while let Some(begin) = rest.find("-----BEGIN ") {
        let block = &rest[begin..];
        let Some((label, after)) = block["-----BEGIN ".len()..].split_once("-----") else { break };
        let end = format!("-----END {label}-----");
        let Some((body, next)) = after.split_once(&end) else { break };
        let body: String = body.chars().filter(|c| !c.is_whitespace()).collect();
        repaired.push_str(&format!("-----BEGIN {label}-----\n"));
        for line in body.as_bytes().chunks(64) {
            repaired.push_str(&String::from_utf8_lossy(line));
            repaired.push('\n');
        }
        repaired.push_str(&end);
        repaired.push('\n');
        rest = next;
    }
    if repaired.is_empty() { value } else { repaired }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEM: &str = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";

    fn vars<'a>(set: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> {
        move |name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
    }

    #[test]
    fn lost_line_breaks_are_put_back() {
        let spaces = PEM.replace('\n', " ");
        let none = PEM.replace('\n', "");
        let literal = PEM.replace('\n', "\\n");
        for broken in [PEM, &spaces, &none, &literal] {
            assert_eq!(repair(broken).trim(), PEM.trim(), "{broken:?}");
        }
        assert_eq!(repair("no PEM"), "no PEM");
        assert_eq!(repair(&(none.clone() + &none)), PEM.repeat(2));
    }

    #[test]
    fn whether_tls_is_used_has_three_values() {
        let (on, off) = ([("AETHER_TLS_ENABLED", "yes")], [("AETHER_TLS_ENABLED", "0"), ("AETHER_TLS_CA_CERT", PEM)]);
        let root = [("AETHER_TLS_CA_CERT", PEM)];
        type Case<'a> = (Option<bool>, &'a [(&'a str, &'a str)], bool);
        let cases: [Case<'_>; 8] = [
            (None, &[], false),
            (None, &on, true),
            (None, &off, false),
            (None, &root, true),
            (Some(false), &on, false),
            (Some(false), &root, false),
            (Some(true), &[], true),
            (Some(true), &off, true),
        ];
        for (enabled, set, used) in cases {
            assert_eq!(Tls::from_vars(enabled, vars(set)).unwrap().is_some(), used, "{enabled:?} {set:?}");
        }
    }

    #[test]
    fn a_certificate_needs_its_key() {
        let set = [("AETHER_TLS_ENABLED", "1"), ("AETHER_TLS_CLIENT_CERT", PEM)];
        assert!(Tls::from_vars(None, vars(&set)).is_err());
    }
}
