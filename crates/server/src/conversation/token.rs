//! Tokens of apps' users: JSON Web Tokens that the app's backend signs with HMAC-SHA256.
//!
//! Whatever is wrong with one is told in the same words, so that nobody learns which apps there are; only whoever has the
//! secret learns more.

use std::{
    sync::{Arc, LazyLock, Mutex, Once, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation,
    crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils},
    dangerous::insecure_decode_claims,
    decode, decode_header, encode,
    errors::{Error as JwtError, ErrorKind},
};
use ring::hmac;
use serde::{Deserialize, Serialize};
use signature::{Signer, Verifier};
use trunkline_core::{
    Error, Kind,
    app::{App, Apps, Visitor},
};
use uuid::Uuid;

use crate::lines::Lines;

/// Whom tokens are for. The published word.
const AUDIENCE: &str = "valet-sdk";

/// How far clocks may differ, in seconds. The published figure.
const LEEWAY: u64 = 30;

/// A token that is good for longer is none, in seconds: whoever finds it has it for too long.
const LIFETIME_MAX: i64 = 24 * 60 * 60;

/// Of a claim, as many characters are logged.
const CLAIM_CHARS_MAX: usize = 200;

/// Longest token, in bytes.
const TOKEN_BYTES_MAX: usize = 4096;

/// What a token says.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: Audience,
    company_api_key: String,
    agent_uuid: String,
    source_key: String,
    #[serde(default)]
    iat: Option<i64>,
    exp: i64,
}

/// Whom a token is for: one, or several (RFC 7519, section 4.1.3). The library checks it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Several(Vec<String>),
}

/// Who asks, and until when.
#[derive(Clone, Debug)]
pub(crate) struct Admitted {
    pub(crate) visitor: Visitor,
    /// In Unix seconds.
    pub(crate) expires_at: i64,
    /// The origin of the page that asks, if that is none of the server's own.
    page: Option<String>,
    /// Of the secret that the token is signed with.
    signed_with: Digest,
}

type Digest = [u8; 32];

fn digest(secret: &[u8]) -> Digest {
    let mut digest = Digest::default();
    digest.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, secret).as_ref());
    digest
}

impl Admitted {
    /// The same, asked for by a page.
    pub(crate) fn on_page(self, page: Option<String>) -> Self {
        Self { page, ..self }
    }

    /// Whether the app would still admit it: the secret that signed it is good, the agent is the app's, and so is the page.
    /// When it expires is another matter.
    pub(crate) fn is_good(&self, apps: &Apps) -> bool {
        let (before, agent) = (self.visitor.app(), self.visitor.agent());
        apps.by_key(&before.key).is_some_and(|app| {
            app.name == before.name
                && app.secrets().any(|secret| digest(secret) == self.signed_with)
                && app.agent(agent.id).is_some()
                && self.page.as_ref().is_none_or(|page| app.origins.contains(page))
        })
    }
}

/// HMAC-SHA256 as the rest of the server does it; nothing else.
struct Hs256(hmac::Key);

impl Signer<Vec<u8>> for Hs256 {
    fn try_sign(&self, message: &[u8]) -> Result<Vec<u8>, signature::Error> {
        Ok(hmac::sign(&self.0, message).as_ref().to_vec())
    }
}

impl JwtSigner for Hs256 {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

impl Verifier<Vec<u8>> for Hs256 {
    /// In constant time.
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        hmac::verify(&self.0, message, signature).map_err(|_| signature::Error::new())
    }
}

impl JwtVerifier for Hs256 {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

fn signer(algorithm: &Algorithm, key: &EncodingKey) -> Result<Box<dyn JwtSigner>, JwtError> {
    match algorithm {
        Algorithm::HS256 => Ok(Box::new(Hs256(hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes())))),
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    }
}

fn verifier(algorithm: &Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>, JwtError> {
    match algorithm {
        Algorithm::HS256 => Ok(Box::new(Hs256(hmac::Key::new(hmac::HMAC_SHA256, key.try_get_as_bytes()?)))),
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    }
}

static PROVIDER: CryptoProvider =
    CryptoProvider { signer_factory: signer, verifier_factory: verifier, key_utils: KeyUtils::new_unimplemented() };

/// A program that has a server inside may have its own already, which does as well.
fn provide() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = PROVIDER.install_default();
    });
}

static VALIDATION: LazyLock<Validation> = LazyLock::new(|| {
    let mut validation = Validation::new(Algorithm::HS256);
    validation.set_audience(&[AUDIENCE]);
    validation.set_required_spec_claims(&["exp", "aud", "iss"]);
    validation.leeway = LEEWAY;
    validation.validate_nbf = true;
    validation
});

fn refused() -> Error {
    Error::new(Kind::Unauthenticated, "ERR_UNAUTHENTICATED", "the token is not good")
}

/// The app that a token claims to be from. It is not known yet whether that is so.
fn claimed(apps: &Apps, token: &str) -> Option<Arc<App>> {
    #[derive(Deserialize)]
    struct Issued {
        company_api_key: String,
    }
    let issued: Issued = insecure_decode_claims(token).ok()?;
    apps.by_key(&issued.company_api_key)
}

/// Whose token it is.
///
/// # Errors
/// [`Kind::Unauthenticated`]; [`Kind::Denied`] for an agent that is none of the app's. With the app, if that signed it.
pub(crate) fn admit(apps: &Apps, token: &str) -> Result<Admitted, (Error, Option<Arc<App>>)> {
    provide();
    // A header that cannot be read is refused before the signature is looked at: nothing is known of such a token.
    if token.len() > TOKEN_BYTES_MAX || decode_header(token).is_err() {
        return Err((refused(), None));
    }
    let app = claimed(apps, token);
    let known = app.clone();
    // As much is done for an app that is not there.
    let nobodys: &[&[u8]] = &[&[0; 32]];
    let secrets: Vec<&[u8]> = app.as_ref().map_or(nobodys.to_vec(), |app| app.secrets().collect());
    let decoded = secrets.into_iter().map(|secret| {
        let decoded = decode::<Claims>(token, &DecodingKey::from_secret(secret), &VALIDATION)?;
        Ok::<_, JwtError>((decoded.claims, secret))
    });
    // The last refusal is that of the older secret; an expired token of the newer one is told as such.
    let (mut claims, mut is_expired, mut wrong) = (None, false, None);
    for each in decoded {
        match each {
            Ok(found) => claims = claims.or(Some(found)),
            Err(error) => {
                is_expired |= matches!(error.kind(), ErrorKind::ExpiredSignature);
                wrong = wrong.or(wrong_claim(&error, token));
            }
        }
    }
    let signed = claims.map(|(claims, secret)| (claims, digest(secret)));
    let (Some(app), Some((claims, signed_with))) = (app.clone(), signed) else {
        if is_expired {
            let expired = Error::new(Kind::Unauthenticated, "ERR_TOKEN_EXPIRED", "the token has expired");
            return Err((expired, known));
        }
        if let (Some(app), Some(wrong)) = (&known, wrong) {
            warn(app, &wrong);
        }
        return Err((refused(), None));
    };
    if let Some(wrong) = contradiction(&claims, now()) {
        warn(&app, &wrong);
        return Err((refused(), known));
    }
    let visitor = visitor(apps, app, &claims).map_err(|error| (error, known))?;
    Ok(Admitted { visitor, expires_at: claims.exp, page: None, signed_with })
}

/// Logs what is wrong with a token that its app signed; the client does not learn it.
fn warn(app: &App, wrong: &str) {
    static LINES: Mutex<Lines> = Mutex::new(Lines::new());
    let count = LINES.lock().unwrap_or_else(PoisonError::into_inner).next();
    if let Some(count) = count {
        tracing::warn!(app = %app.name, wrong, count, "tokens with a good signature are refused");
    }
}

/// What is wrong with a token whose signature is good; nothing if that is not known, or it has expired.
fn wrong_claim(error: &JwtError, token: &str) -> Option<String> {
    let found = |name: &str| {
        let claims: serde_json::Value = insecure_decode_claims(token).unwrap_or_default();
        claims[name].to_string().chars().take(CLAIM_CHARS_MAX).collect::<String>()
    };
    Some(match error.kind() {
        ErrorKind::MissingRequiredClaim(name) => format!("there is no {name}"),
        ErrorKind::InvalidAudience => format!("aud is {}, and not {AUDIENCE:?}", found("aud")),
        ErrorKind::ImmatureSignature => format!("nbf is {}, and it is {}", found("nbf"), now()),
        ErrorKind::Json(error) => format!("its claims cannot be read: {error}"),
        _ => return None,
    })
}

/// What is wrong with the claims of a token beside each other, and beside the time.
fn contradiction(claims: &Claims, now: i64) -> Option<String> {
    let Claims { iss, company_api_key, iat, exp, .. } = claims;
    // What begins in the future would be good for longer than it says.
    let begins = iat.unwrap_or(now).min(now);
    let lifetime = exp.saturating_sub(begins);
    match iat {
        Some(iat) if *iat > now.saturating_add(LEEWAY.cast_signed()) => Some(format!("iat is {iat}, and it is {now}")),
        _ if iss != company_api_key => Some(format!("iss is {iss:?}, and not company_api_key, {company_api_key:?}")),
        _ if lifetime > LIFETIME_MAX => {
            Some(format!("it is good for {lifetime} s, and not for {LIFETIME_MAX} at most"))
        }
        _ => None,
    }
}

/// Whom a token names that its app signed.
fn visitor(apps: &Apps, app: Arc<App>, claims: &Claims) -> Result<Visitor, Error> {
    let denied = |_| Error::new(Kind::Denied, "ERR_AGENT", "agent_uuid is none of this app's agents");
    let agent = Uuid::try_parse(&claims.agent_uuid).map_err(denied)?;
    apps.visitor(app, agent, &claims.source_key)
}

/// A token as the app's backend would sign it.
pub(crate) fn sign(app: &App, agent: Uuid, user: &str, seconds: u32) -> Result<String, Error> {
    let missing = || Error::new(Kind::Internal, "ERR_INTERNAL", "an app without a secret");
    sign_with(&app.key, app.secrets().next().ok_or_else(missing)?, &agent.to_string(), user, seconds)
}

/// The same, by whoever has the secret.
pub(crate) fn sign_with(key: &str, secret: &[u8], agent: &str, user: &str, seconds: u32) -> Result<String, Error> {
    provide();
    if i64::from(seconds) > LIFETIME_MAX {
        let why = format!("a token is good for {LIFETIME_MAX} seconds at most");
        return Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", why));
    }
    let internal = |e: String| Error::new(Kind::Internal, "ERR_INTERNAL", e);
    let issued = now();
    let claims = Claims {
        iss: key.to_owned(),
        aud: Audience::One(AUDIENCE.to_owned()),
        company_api_key: key.to_owned(),
        agent_uuid: agent.to_owned(),
        source_key: user.to_owned(),
        iat: Some(issued),
        exp: issued + i64::from(seconds),
    };
    let signed = encode(&Header::new(Algorithm::HS256), &claims, &EncodingKey::from_secret(secret));
    signed.map_err(|e| internal(e.to_string()))
}

/// Unix seconds.
pub(crate) fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs());
    i64::try_from(now).unwrap_or(i64::MAX)
}
