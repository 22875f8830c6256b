//! Credentials: who may claim to be whom.
//!
//! This version knows no credentials yet, so it admits nobody, or with `--dev` everybody who does not present one. A
//! credential that cannot be checked is refused, never ignored.

use std::collections::HashMap;

use trunkline_core::{Error, Kind, identity::Identity};

/// Keys of the credentials map that carry a credential, in the order in which they are looked at.
const CREDENTIALS: [&str; 6] = ["token", "task_token", "x-api-key", "api_key", "authorization", "bearer_token"];

/// How connections are admitted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Auth {
    /// Admit whoever presents nothing.
    pub(crate) dev: bool,
}

impl Auth {
    /// Admits `claimed`, or says why not; answers whether it administers the server. With `--dev`, orchestrators and the
    /// workflow engine do, as in the published server's development mode; otherwise nobody does by claiming a kind.
    pub(crate) fn admit(self, claimed: &Identity, credentials: &HashMap<String, String>) -> Result<bool, Error> {
        let presented =
            CREDENTIALS.into_iter().find(|key| credentials.get(*key).is_some_and(|value| !value.is_empty()));
        let kind = claimed.kind();
        match presented {
            Some("token" | "task_token") => Err(refused("invalid or revoked token: unknown token".to_owned())),
            Some(_) => {
                Err(refused("credential authentication failed: authentication failed: unknown credential".to_owned()))
            }
            None if self.dev => Ok(matches!(claimed, Identity::Orchestrator(_) | Identity::WorkflowEngine)),
            None => Err(refused(format!("anonymous connection as {kind} requires a matching API key credential"))),
        }
    }
}

fn refused(message: String) -> Error {
    Error::new(Kind::Unauthenticated, "ERR_UNAUTHENTICATED", message)
}

#[cfg(test)]
mod tests {
    use super::{Auth, HashMap, Identity};

    #[test]
    fn only_dev_admits_and_only_without_a_credential() {
        let agent = Identity::agent("w", "i", "s").unwrap();
        let with = |key: &str, value: &str| HashMap::from([(key.to_owned(), value.to_owned())]);
        assert!(!Auth { dev: true }.admit(&agent, &HashMap::new()).unwrap());
        let orchestrator = Identity::orchestrator("i", "s").unwrap();
        assert!(Auth { dev: true }.admit(&orchestrator, &HashMap::new()).unwrap());
        assert!(Auth { dev: true }.admit(&agent, &with("token", "")).is_ok());
        assert!(Auth { dev: true }.admit(&agent, &with("other", "x")).is_ok());
        for key in super::CREDENTIALS {
            assert!(Auth { dev: true }.admit(&agent, &with(key, "x")).is_err(), "{key}");
        }
        assert!(Auth { dev: false }.admit(&agent, &HashMap::new()).is_err());
    }
}
