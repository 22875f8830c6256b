//! Who is asking.

use crate::{gate::rules::Name, identity::Identity};

/// An admitted principal in one session. Everything it sends is stamped with this, never with what it says itself.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Who it is.
    pub identity: Identity,
    /// Its session: new with every connection, also when one resumes.
    pub session: String,
    /// It administers the server: its credential says so, never its kind.
    pub is_admin: bool,
    /// How rules name it. A user's windows share their rules.
    pub subject: Name,
}

impl Caller {
    /// A principal in a session.
    #[must_use]
    pub fn new(identity: Identity, session: String, is_admin: bool) -> Self {
        let id = match &identity {
            Identity::User { user, .. } => user.clone(),
            other => other.to_string(),
        };
        let subject = Name::new(identity.kind().rule_word(), id);
        Self { identity, session, is_admin, subject }
    }
}
