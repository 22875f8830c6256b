//! Who is asking.

use crate::identity::Identity;

/// An admitted principal in one session. Everything it sends is stamped with this, never with what it says itself.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Who it is.
    pub identity: Identity,
    /// Its session: new with every connection, also when one resumes.
    pub session: String,
}
