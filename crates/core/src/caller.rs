//! Who is asking.

use std::sync::Arc;

use uuid::Uuid;

use crate::{
    error::Error,
    gate::rules::Name,
    identity::{Identity, SEPARATOR},
    token::opens,
};

/// An admitted principal in one session. Everything it sends is stamped with this, never with what it says itself.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Who it is.
    pub identity: Identity,
    /// Its session: new with every connection, also when one resumes.
    pub session: String,
    /// How rules name it. A user's windows share their rules.
    pub subject: Name,
    /// What it came in with.
    pub credential: Credential,
}

/// What a principal came in with, and what that gives.
#[derive(Clone, Debug)]
pub struct Credential {
    /// It administers the server. A principal's kind never says so.
    pub is_admin: bool,
    /// The API key, by id.
    pub token: Option<String>,
    /// The task whose token it is.
    pub task: Option<Uuid>,
    /// When it ends, in Unix seconds. What it opened ends with it.
    pub expires_at: Option<i64>,
    /// Patterns of the workspaces that it opens, and of the projects of sandboxes.
    pub workspaces: Arc<[glob::Pattern]>,
    /// What it gives on sandboxes.
    pub sandboxes: Access,
    /// The only project in which it acts as a sandbox, once it has; empty for none.
    pub acts_in: Option<Box<str>>,
    /// Patterns of the clients of the socket surface whose streams it shows.
    pub shows: Arc<[glob::Pattern]>,
    /// Patterns of those whose runtime it is.
    pub serves: Arc<[glob::Pattern]>,
}

/// What somebody may do with sandboxes that it is not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Not even know of them.
    #[default]
    None,
    /// Watch them.
    Read,
    /// Make them, tell them what to do, remove them.
    Write,
}

impl Credential {
    /// None at all, where that is enough: it opens every workspace.
    #[must_use]
    pub fn none(is_admin: bool) -> Self {
        let all = glob::Pattern::new("*").into_iter().collect();
        Self {
            is_admin,
            token: None,
            task: None,
            expires_at: None,
            workspaces: all,
            sandboxes: Access::None,
            acts_in: None,
            shows: [].into(),
            serves: [].into(),
        }
    }

    /// Whether it gives what the other one gives, whichever key either of them is.
    #[must_use]
    pub fn gives_the_same(&self, other: &Self) -> bool {
        self.is_admin == other.is_admin
            && self.sandboxes == other.sandboxes
            && self.task == other.task
            && self.workspaces == other.workspaces
    }
}

impl Caller {
    /// A principal in a session.
    #[must_use]
    pub fn new(identity: Identity, session: String, credential: Credential) -> Self {
        let id = match &identity {
            Identity::User { user, .. } => user.clone(),
            other => other.to_string(),
        };
        let subject = Name::new(identity.kind().rule_word(), id);
        Self { identity, session, subject, credential }
    }

    /// An end user of an app in a conversation. The app's backend names its users as it likes, so rules and tasks of the
    /// user of the agent surface who has that name are not about this one, nor the other way round.
    ///
    /// # Errors
    /// [`crate::Kind::Invalid`] if it is no name.
    pub(crate) fn app_user(app: &str, user: &str, conversation: Uuid) -> Result<Self, Error> {
        let credential = Credential { workspaces: [].into(), ..Credential::none(false) };
        let identity = Identity::user(user, &conversation.to_string())?;
        // No user's id has the separator in it.
        let subject = Name::new("app_user", format!("{app}{SEPARATOR}{user}"));
        Ok(Self { identity, session: String::new(), subject, credential })
    }

    /// Whether its credential opens a workspace; rules may still close it.
    #[must_use]
    pub fn opens(&self, workspace: &str) -> bool {
        opens(&self.credential.workspaces, workspace)
    }
}
