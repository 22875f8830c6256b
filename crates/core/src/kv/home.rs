//! Gives exclusive keys that earlier versions stored without a workspace to their owners.
//!
//! Those versions kept one space for all agents (or unique tasks) of an implementation and a specifier, over all
//! workspaces. [`settle`] copies such a space to each of those identities that the server knows: every one of them could
//! read it until then, and from then on each has its own. A space of which no owner is known is set aside, out of reach of
//! every caller, because whoever connects under that name first need not be its owner; an operator says whose it is.

use std::collections::BTreeSet;

use super::sql;
use crate::{
    error::Error,
    gate::Gate,
    identity::{Identity, SEPARATOR, workspace},
};

/// Begins the namespaces that are set aside.
const ASIDE: &str = "unplaced";

/// Moves keys that have no workspace in their namespace. With `default_workspace` not empty, spaces without a known owner
/// go to the agent or task of their name in that workspace; otherwise they are set aside, and a later call with a
/// workspace finds them. A key that the new owner has already stays. To be called before callers are served.
///
/// # Errors
/// [`crate::Kind::Invalid`] if `default_workspace` cannot be a workspace, [`crate::Kind::Unavailable`].
pub async fn settle(gate: &Gate, default_workspace: &str) -> Result<(), Error> {
    let default = (!default_workspace.is_empty()).then(|| workspace(default_workspace)).transpose()?;
    let spaces: Vec<Space> =
        gate.glance(sql::spaces_without_workspace).await?.iter().filter_map(|name| Space::parse(name)).collect();
    if spaces.is_empty() {
        return Ok(());
    }
    let known =
        if spaces.iter().any(|space| !space.is_aside) { known_identities(gate).await? } else { BTreeSet::new() };
    for space in spaces {
        let homes = space.homes(&known, default.as_deref());
        let (from, to) = (space.stored_as.clone(), space.namespaces(&homes));
        if homes.is_empty() {
            tracing::warn!(
                space = from,
                "exclusive keys of an earlier version have no known owner and are out of reach; kv.legacy_workspace \
                gives them to the agent or task of that name in a workspace"
            );
        } else {
            tracing::info!(space = from, ?to, "exclusive keys of an earlier version move to their owners");
        }
        if from != to[0] {
            gate.housekeep(move |tx| sql::move_space(tx, from.clone(), to.clone())).await?;
        }
    }
    Ok(())
}

/// Identities that connected, hold tasks or are named by rules and API keys.
async fn known_identities(gate: &Gate) -> Result<BTreeSet<String>, Error> {
    let mut known: BTreeSet<String> = gate.glance(crate::session::owners).await?.into_iter().collect();
    known.extend(gate.glance(crate::checkpoint::owners).await?);
    known.extend(gate.glance(crate::task::parties).await?);
    known.extend(gate.glance(crate::token::bindings).await?);
    known.extend(gate.rules().iter().map(|rule| rule.principal.id.clone()));
    Ok(known)
}

/// A namespace that was stored without the workspace of its owner.
struct Space {
    /// Its name in the rows.
    stored_as: String,
    /// It was set aside before.
    is_aside: bool,
    /// The kind of its owners, as identities begin.
    prefix: &'static str,
    implementation: String,
    specifier: String,
    /// The user or workspace that the keys are about.
    about: Vec<String>,
}

impl Space {
    fn parse(stored_as: &str) -> Option<Self> {
        let mut parts = stored_as.split(SEPARATOR).peekable();
        let is_aside = parts.next_if_eq(&ASIDE).is_some();
        let prefix = match parts.next()? {
            "agent" => "ag",
            "task" => "tu",
            _ => return None,
        };
        let (implementation, specifier) = (parts.next()?.to_owned(), parts.next()?.to_owned());
        let about = parts.map(ToOwned::to_owned).collect();
        Some(Self { stored_as: stored_as.to_owned(), is_aside, prefix, implementation, specifier, about })
    }

    /// Workspaces of its owners: those of known identities; or else the one that the keys are about, which is the owner's
    /// own unless it named another; or else the default.
    fn homes(&self, known: &BTreeSet<String>, default: Option<&str>) -> Vec<String> {
        let is_owner = |identity: &Identity| match identity {
            Identity::Agent(named) if self.prefix == "ag" => self.is_named(&named.implementation, &named.specifier),
            Identity::UniqueTask(named) if self.prefix == "tu" => {
                self.is_named(&named.implementation, &named.specifier)
            }
            _ => false,
        };
        // What was set aside is the operator's to give: who came since then may be anybody.
        if self.is_aside {
            return default.map(ToOwned::to_owned).into_iter().collect();
        }
        let owners = known.iter().filter_map(|name| Identity::parse(name).ok()).filter(is_owner);
        let homes: Vec<String> = owners.filter_map(|owner| owner.workspace().map(ToOwned::to_owned)).collect();
        if !homes.is_empty() {
            return homes;
        }
        let named = match &self.about[..] {
            [.., label, workspace] if label == "workspace" => Some(workspace.as_str()),
            _ => None,
        };
        named.or(default).map(ToOwned::to_owned).into_iter().collect()
    }

    fn is_named(&self, implementation: &str, specifier: &str) -> bool {
        self.implementation == implementation && self.specifier == specifier
    }

    /// Where its keys go: at least one namespace.
    fn namespaces(&self, homes: &[String]) -> Vec<String> {
        let rest = || [&self.implementation, &self.specifier].into_iter().chain(&self.about).map(String::as_str);
        let join = |first: &[&str]| first.iter().copied().chain(rest()).collect::<Vec<_>>().join(SEPARATOR);
        if homes.is_empty() {
            let kind = if self.prefix == "ag" { "agent" } else { "task" };
            return vec![join(&[ASIDE, kind])];
        }
        homes.iter().map(|home| join(&[self.prefix, home])).collect()
    }
}
