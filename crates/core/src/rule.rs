//! Administration of rules: who may make them, how they are kept. What they mean is in [`crate::gate::rules`].

pub(crate) mod sql;

use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::{
        ChangeRules, Gate,
        rules::{Fallback, Level, Name, Rule, check_breadth, check_pattern},
    },
};

/// A rule to be made.
#[derive(Clone, Debug)]
pub struct Grant {
    /// For whom.
    pub principal: Name,
    /// On what.
    pub resource: Name,
    /// How much.
    pub level: Level,
    /// Until when, in Unix seconds.
    pub expires_at: Option<i64>,
    /// Why.
    pub reason: String,
    /// On whose word; counts only if an administrator says so, otherwise it is the caller's own.
    pub granted_by: String,
}

/// Which rules; what is empty fits all.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Kind of principal.
    pub principal_kind: String,
    /// Which principal.
    pub principal_id: String,
    /// Kind of resource.
    pub resource_kind: String,
    /// Which resource.
    pub resource_id: String,
}

impl Filter {
    fn fits(&self, rule: &Rule) -> bool {
        let pairs = [
            (&self.principal_kind, &rule.principal.kind),
            (&self.principal_id, &rule.principal.id),
            (&self.resource_kind, &rule.resource.kind),
            (&self.resource_id, &rule.resource.id),
        ];
        pairs.into_iter().all(|(wanted, actual)| wanted.is_empty() || wanted == actual)
    }

    /// It names no rule.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        [&self.principal_kind, &self.principal_id, &self.resource_kind, &self.resource_id]
            .into_iter()
            .all(String::is_empty)
    }

    fn resource(&self) -> Name {
        Name::new(self.resource_kind.as_str(), self.resource_id.as_str())
    }

    fn principal(&self) -> Name {
        Name::new(self.principal_kind.as_str(), self.principal_id.as_str())
    }
}

/// Makes a rule, or changes the one for the same principal and resource, which keeps its id.
///
/// # Errors
/// [`Kind::Denied`]; [`Kind::Invalid`] for names that cover too much, are empty, or for a time that is over.
pub async fn grant(gate: &Gate, caller: &Caller, grant: Grant) -> Result<Rule, Error> {
    for (what, value) in [
        ("principal_type", &grant.principal.kind),
        ("principal_id", &grant.principal.id),
        ("resource_type", &grant.resource.kind),
        ("resource_id", &grant.resource.id),
    ] {
        if value.is_empty() {
            return Err(invalid(format!("{what} is required")));
        }
    }
    if grant.principal.kind.contains(['*', '?']) || grant.resource.kind.contains(['*', '?']) {
        return Err(invalid("principal_type and resource_type cannot be patterns".to_owned()));
    }
    check_breadth("principal_id", &grant.principal.id)?;
    check_breadth("resource_id", &grant.resource.id)?;
    check_pattern("principal_id", &grant.principal)?;
    check_pattern("resource_id", &grant.resource)?;
    let now = now();
    if grant.expires_at.is_some_and(|expires| expires <= now) {
        return Err(invalid("expires_at is in the past".to_owned()));
    }
    let existing = gate.rules().get(&grant.principal, &grant.resource).map(|rule| rule.level);
    let level = existing.map_or(grant.level, |existing| existing.max(grant.level));
    let permit = gate.authorize(caller, ChangeRules::one(&grant.resource, level))?;
    let Grant { principal, resource, level, expires_at, reason, granted_by } = grant;
    let (id, granted_by) = (Uuid::new_v4().to_string(), author(caller, granted_by));
    let rule = Rule { id, principal, resource, level, granted_by, granted_at: now, expires_at, reason };
    gate.put_rule(&permit, rule).await
}

/// Removes a rule, named by what it is about or by its id.
///
/// # Errors
/// [`Kind::NotFound`], [`Kind::Denied`].
pub async fn revoke(gate: &Gate, caller: &Caller, filter: &Filter, rule_id: &str) -> Result<(), Error> {
    let rules = gate.rules();
    let found = if filter.is_empty() {
        rules.iter().find(|rule| rule.id == rule_id)
    } else {
        rules.get(&filter.principal(), &filter.resource())
    };
    let resource = found.map_or_else(|| filter.resource(), |rule| rule.resource.clone());
    let level = found.map_or(Level::NONE, |rule| rule.level);
    // Whoever may not change it does not learn whether it is there.
    let permit = gate.authorize(caller, ChangeRules::one(&resource, level))?;
    let missing = || Error::new(Kind::NotFound, "ERR_NOT_FOUND", "ACL rule not found");
    let rule = found.ok_or_else(missing)?;
    if gate.remove_rule(&permit, rule.principal.clone(), rule.resource.clone()).await? {
        Ok(())
    } else {
        Err(missing())
    }
}

/// The rules that fit, newest first.
///
/// # Errors
/// [`Kind::Denied`].
pub fn list(gate: &Gate, caller: &Caller, filter: &Filter) -> Result<Vec<Rule>, Error> {
    gate.authorize(caller, ChangeRules::look(&filter.resource()))?;
    let mut rules: Vec<Rule> = gate.rules().iter().filter(|rule| filter.fits(rule)).cloned().collect();
    rules.sort_by(|a, b| b.granted_at.cmp(&a.granted_at).then_with(|| a.id.cmp(&b.id)));
    Ok(rules)
}

/// The fallback of a category.
///
/// # Errors
/// [`Kind::NotFound`], [`Kind::Denied`].
pub fn fallback(gate: &Gate, caller: &Caller, category: &str) -> Result<Fallback, Error> {
    gate.authorize(caller, ChangeRules::look_at_all("this ACL operation requires an admin_acl grant"))?;
    let found = gate.rules().fallback(category).cloned();
    found.ok_or_else(|| Error::new(Kind::NotFound, "ERR_NOT_FOUND", "fallback policy not found"))
}

/// Sets the fallback of a category.
///
/// # Errors
/// [`Kind::Denied`], [`Kind::Invalid`].
pub async fn set_fallback(
    gate: &Gate,
    caller: &Caller,
    category: &str,
    level: Level,
    updated_by: String,
) -> Result<Fallback, Error> {
    if category.is_empty() {
        return Err(invalid("rule_category is required".to_owned()));
    }
    let permit = gate.authorize(caller, ChangeRules::all())?;
    let fallback = Fallback { level, updated_by: author(caller, updated_by), updated_at: now() };
    gate.put_fallback(&permit, category.to_owned(), fallback).await
}

/// Removes the rules that expired; answers how many.
///
/// # Errors
/// [`Kind::Denied`].
pub async fn clean_up(gate: &Gate, caller: &Caller) -> Result<usize, Error> {
    let permit = gate.authorize(caller, ChangeRules::all())?;
    let (rules, now) = (gate.rules(), now());
    let mut removed = 0;
    for rule in rules.iter().filter(|rule| rule.expires_at.is_some_and(|expires| expires < now)) {
        removed += usize::from(gate.remove_rule(&permit, rule.principal.clone(), rule.resource.clone()).await?);
    }
    Ok(removed)
}

fn author(caller: &Caller, claimed: String) -> String {
    if caller.credential.is_admin && !claimed.is_empty() { claimed } else { caller.subject.id.clone() }
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}

pub(crate) fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs() as i64)
}
