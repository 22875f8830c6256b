//! What the demo does in place of an app's backend.

use trunkline_core::Error;

use crate::conversation::token;

/// A token for a user of an app, good for so many seconds, as the app's backend would sign it.
///
/// # Errors
/// If it would be good for more than a day.
pub fn sign(key: &str, secret: &str, agent: &str, user: &str, seconds: u32) -> Result<String, Error> {
    token::sign_with(key, secret.as_bytes(), agent, user, seconds)
}
