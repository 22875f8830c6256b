//! Rules: who has which level of access to what, and which rule decides. Pure.
//!
//! The first tier with a live rule decides, even if its level is too low:
//!
//! 1. rules for the principal on exactly this resource
//! 2. rules for everybody of its kind ([`everybody`]) on exactly this resource
//! 3. and 4. the same two on `*`
//! 5. rules with `*` or `?` in a name, of which the highest level counts
//! 6. the fallback for this kind of principal and resource
//!
//! Without any of them the level is [`Level::NONE`].

mod patterns;

use std::{
    collections::HashMap,
    fmt::{self, Write as _},
    sync::LazyLock,
};

use patterns::Patterns;

use crate::{
    error::{Error, Kind},
    identity::SEPARATOR,
};

/// How much access. Levels compare: more includes less.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(i64);

impl Level {
    /// None at all.
    pub const NONE: Self = Self(0);
    /// Connect, look.
    pub const READ: Self = Self(10);
    /// Send, change.
    pub const READ_WRITE: Self = Self(20);
    /// Act for others, share.
    pub const MANAGE: Self = Self(30);
    /// Administer.
    pub const ADMIN: Self = Self(40);
    /// Everything.
    pub const SUPERADMIN: Self = Self(50);

    /// The level of this number of the published contract.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for other numbers than 0, 10, 20, 30, 40 and 50.
    pub fn new(number: i64) -> Result<Self, Error> {
        if (0..=50).contains(&number) && number % 10 == 0 {
            return Ok(Self(number));
        }
        Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", "invalid access level"))
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> i64 {
        self.0
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            0 => "NONE",
            10 => "READ",
            20 => "READWRITE",
            30 => "MANAGE",
            40 => "ADMIN",
            _ => "SUPERADMIN",
        })
    }
}

/// A kind and a name within it: a principal (`agent` and `ag::…`) or a resource (`workspace` and `prod`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// What kind of thing.
    pub kind: String,
    /// Which one.
    pub id: String,
}

impl Name {
    /// The name of `id` among things of `kind`.
    pub fn new(kind: impl Into<String>, id: impl Into<String>) -> Self {
        Self { kind: kind.into(), id: id.into() }
    }

    fn has_wildcard(&self) -> bool {
        // The lone `*` has a tier of its own.
        [&self.kind, &self.id].into_iter().any(|part| part.contains(['*', '?'])) && self.id != "*"
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind, self.id)
    }
}

/// One rule. There is at most one for a principal and a resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Made when the rule was; kept when it changes.
    pub id: String,
    /// Whom it is about.
    pub principal: Name,
    /// What it is about.
    pub resource: Name,
    /// What it gives; [`Level::NONE`] takes away what lower tiers would give.
    pub level: Level,
    /// Who made it.
    pub granted_by: String,
    /// When, in Unix seconds.
    pub granted_at: i64,
    /// Ignored from then on, in Unix seconds.
    pub expires_at: Option<i64>,
    /// Why.
    pub reason: String,
}

/// What a principal of a kind may do with a kind of resource when no rule says otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fallback {
    /// The level.
    pub level: Level,
    /// Who set it.
    pub updated_by: String,
    /// When, in Unix seconds.
    pub updated_at: i64,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What the principal has.
    pub level: Level,
    /// A rule decided, not the fallback.
    pub by_rule: bool,
    tier: Tier,
}

/// Where it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tier {
    /// A rule, in the published words for its tier.
    Rule(&'static str),
    Fallback,
    Nothing,
}

impl Decision {
    /// Why, in the published words; the kinds are those of the principal and the resource that were asked about.
    #[must_use]
    pub fn reason(&self, principal_kind: &str, resource_kind: &str) -> String {
        let (level, category) = (self.level, category(principal_kind, resource_kind));
        match self.tier {
            Tier::Rule(what) => format!("{what}: {level}"),
            Tier::Fallback => format!("Fallback policy for {category}: {level}"),
            Tier::Nothing => format!("No rule or fallback policy for {category}"),
        }
    }
}

/// All rules and fallbacks.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    exact: HashMap<Name, Own>,
    with_wildcards: Patterns,
    fallbacks: HashMap<String, Fallback>,
}

/// The rules for exactly one principal.
#[derive(Clone, Debug, Default)]
struct Own {
    on: HashMap<Name, Rule>,
    /// On `*`, by the kind of resource.
    on_any: HashMap<String, Rule>,
}

impl Own {
    fn get(&self, resource: &Name) -> Option<&Rule> {
        if resource.id == "*" { self.on_any.get(&resource.kind) } else { self.on.get(resource) }
    }

    fn is_empty(&self) -> bool {
        self.on.is_empty() && self.on_any.is_empty()
    }
}

/// The principal that stands for everybody of a kind, where there is one.
#[must_use]
pub fn everybody(kind: &str) -> Option<&'static Name> {
    static NAMES: LazyLock<[Name; 4]> = LazyLock::new(|| {
        ["_any_authenticated_user", "_any_agent", "_any_task", "_any_service"].map(|id| Name::new("wildcard", id))
    });
    let [user, agent, task, service] = &*NAMES;
    match kind {
        "user" => Some(user),
        "agent" => Some(agent),
        "task" => Some(task),
        "service" => Some(service),
        _ => None,
    }
}

/// The fallback's category for a kind of principal and of resource.
#[must_use]
pub fn category(principal_kind: &str, resource_kind: &str) -> String {
    let mut category = String::with_capacity(principal_kind.len() + resource_kind.len() + 1);
    // Writing to a string cannot fail.
    let _ = write!(category, "{principal_kind}_{resource_kind}");
    category
}

impl Rules {
    /// Adds a rule, in place of the one for the same principal and resource.
    pub fn put(&mut self, rule: Rule) {
        if rule.principal.has_wildcard() || rule.resource.has_wildcard() {
            self.with_wildcards.put(rule);
            return;
        }
        let own = self.exact.entry(rule.principal.clone()).or_default();
        if rule.resource.id == "*" {
            own.on_any.insert(rule.resource.kind.clone(), rule);
        } else {
            own.on.insert(rule.resource.clone(), rule);
        }
    }

    /// Removes the rule for a principal and a resource; answers it.
    pub fn remove(&mut self, principal: &Name, resource: &Name) -> Option<Rule> {
        if let Some(rule) = self.with_wildcards.remove(principal, resource) {
            return Some(rule);
        }
        let own = self.exact.get_mut(principal)?;
        let removed = if resource.id == "*" { own.on_any.remove(&resource.kind) } else { own.on.remove(resource) };
        if own.is_empty() {
            self.exact.remove(principal);
        }
        removed
    }

    /// The rule for a principal and a resource.
    #[must_use]
    pub fn get(&self, principal: &Name, resource: &Name) -> Option<&Rule> {
        let exact = self.exact.get(principal).and_then(|own| own.get(resource));
        exact.or_else(|| self.with_wildcards.get(principal, resource))
    }

    /// All rules, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &Rule> {
        let exact = self.exact.values().flat_map(|own| own.on.values().chain(own.on_any.values()));
        exact.chain(self.with_wildcards.iter())
    }

    /// The fallback of a [`category`].
    #[must_use]
    pub fn fallback(&self, category: &str) -> Option<&Fallback> {
        self.fallbacks.get(category)
    }

    /// Sets the fallback of a [`category`].
    pub fn set_fallback(&mut self, category: String, fallback: Fallback) {
        self.fallbacks.insert(category, fallback);
    }

    /// What `principal` has on a whole set of resources that a pattern names: by rules on exactly that pattern, for it or for
    /// everybody of its kind. Whoever has one thing of the set, or things that a pattern of another meaning matches, has not all.
    #[must_use]
    pub fn decide_pattern(&self, principal: &Name, pattern: &Name, now: i64) -> Level {
        let rules = [Some(principal), everybody(&principal.kind)].into_iter().flatten();
        let live = |rule: &&Rule| rule.expires_at.is_none_or(|expires| now <= expires);
        let mut rules = rules.filter_map(|of| self.get(of, pattern)).filter(live);
        rules.next().map_or(Level::NONE, |rule| rule.level)
    }

    /// What `principal` has on `resource` at `now` (Unix seconds).
    #[must_use]
    pub fn decide(&self, principal: &Name, resource: &Name, now: i64) -> Decision {
        let live = |rule: &Rule| rule.expires_at.is_none_or(|expires| now <= expires);
        let own = self.exact.get(principal);
        let all = everybody(&principal.kind).and_then(|everybody| self.exact.get(everybody));
        let on_it = |of: Option<&'_ Own>| of.and_then(|of| of.get(resource)).filter(|rule| live(rule)).map(|r| r.level);
        let on_any = |of: Option<&'_ Own>| {
            let rule = of.filter(|_| resource.id != "*").and_then(|of| of.on_any.get(&resource.kind));
            rule.filter(|rule| live(rule)).map(|rule| rule.level)
        };
        let pattern = || self.with_wildcards.best(principal, resource, live).map(|rule| rule.level);
        let found = |what: &'static str| move |level| (level, what);
        let by_rule = (on_it(own).map(found("Explicit rule")))
            .or_else(|| on_it(all).map(found("Wildcard rule")))
            .or_else(|| on_any(own).map(found("Any-resource rule")))
            .or_else(|| on_any(all).map(found("Wildcard any-resource rule")))
            .or_else(|| pattern().map(found("Glob pattern rule")));
        if let Some((level, what)) = by_rule {
            return Decision { level, by_rule: true, tier: Tier::Rule(what) };
        }
        match self.fallbacks.get(&category(&principal.kind, &resource.kind)) {
            Some(Fallback { level, .. }) => Decision { level: *level, by_rule: false, tier: Tier::Fallback },
            None => Decision { level: Level::NONE, by_rule: false, tier: Tier::Nothing },
        }
    }
}

/// Whether a rule's name is a pattern, or stands for all things of its kind.
#[must_use]
pub fn is_pattern(id: &str) -> bool {
    id.contains(['*', '?'])
}

/// Refuses names that are patterns and cannot be read: a rule that never fits takes nothing away.
///
/// # Errors
/// [`Kind::Invalid`] naming the field and the mistake.
pub fn check_pattern(what: &str, name: &Name) -> Result<(), Error> {
    match glob::Pattern::new(&name.to_string()) {
        Err(error) if is_pattern(&name.id) => {
            let message = format!("{what} {:?} is no pattern: {}", name.id, error.msg);
            Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message))
        }
        _ => Ok(()),
    }
}

/// Refuses names that would cover more than one implementation: before the first wildcard there must be three segments
/// for agents and tasks, two for the others. Names that are none of a principal pass.
///
/// # Errors
/// [`Kind::Invalid`] with the published text.
pub fn check_breadth(what: &str, id: &str) -> Result<(), Error> {
    let wanted = match id.split(SEPARATOR).next() {
        Some("ag" | "tu" | "ta") => 3,
        Some("sv" | "br" | "us" | "orc" | "wfe" | "metric" | "event") => 2,
        _ => return Ok(()),
    };
    let (Some(wildcard), true) = (id.find(['*', '?']), id.contains(SEPARATOR)) else { return Ok(()) };
    let segments = id[..wildcard].split(SEPARATOR).filter(|segment| !segment.is_empty()).count();
    if segments >= wanted {
        return Ok(());
    }
    let message = format!(
        "{what} glob pattern too broad: {id:?} has {segments} segment(s) before wildcard, minimum {wanted} required"
    );
    Err(Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message))
}

#[cfg(test)]
mod tests {
    use super::{Fallback, Level, Name, Rule, Rules, check_breadth, check_pattern, everybody};

    const NOW: i64 = 1000;

    fn rules(list: &[(&str, &str, i64)]) -> Rules {
        let mut rules = Rules::default();
        for (principal, resource, level) in list {
            rules.put(rule(principal, resource, *level, None));
        }
        let level = Level::READ_WRITE;
        rules.set_fallback("agent_workspace".into(), Fallback { level, updated_by: "_system".into(), updated_at: 0 });
        rules
    }

    fn rule(principal: &str, resource: &str, level: i64, expires_at: Option<i64>) -> Rule {
        let (id, granted_by, reason) = (String::new(), String::new(), String::new());
        let level = Level::new(level).unwrap();
        Rule {
            id,
            principal: name(principal),
            resource: name(resource),
            level,
            granted_by,
            granted_at: 0,
            expires_at,
            reason,
        }
    }

    fn name(text: &str) -> Name {
        let (kind, id) = text.split_once(':').unwrap();
        Name::new(kind, id)
    }

    fn check(list: &[(&str, &str, i64)], resource: &str, expected: i64) {
        let decision = rules(list).decide(&name("agent:ag::w::i::s"), &name(resource), NOW);
        assert_eq!(decision.level.number(), expected, "{list:?} on {resource}: {decision:?}");
    }

    #[test]
    fn the_first_tier_with_a_rule_decides() {
        const ME: &str = "agent:ag::w::i::s";
        const ALL: &str = "wildcard:_any_agent";
        check(&[], "workspace:w", 20);
        check(&[], "kv_scope:global", 0);
        check(&[(ME, "workspace:w", 0)], "workspace:w", 0);
        check(&[(ME, "workspace:w", 10), (ME, "workspace:*", 40)], "workspace:w", 10);
        check(&[(ALL, "workspace:w", 0), (ME, "workspace:*", 40)], "workspace:w", 0);
        check(&[(ME, "workspace:*", 10), (ALL, "workspace:*", 40)], "workspace:w", 10);
        check(&[(ALL, "workspace:*", 40), ("agent:ag::w::i::*", "workspace:w", 10)], "workspace:w", 40);
        check(
            &[("agent:ag::w::i::*", "workspace:w", 10), ("agent:ag::w::i::s*", "workspace:?", 30)],
            "workspace:w",
            30,
        );
        check(&[("agent:ag::w::j::*", "workspace:w", 10)], "workspace:w", 20);
        check(&[(ME, "admin:admin/*", 40)], "admin:admin/acl", 40);
        check(&[(ME, "capability:capability*", 40)], "capability:capability/x", 0);
        check(&[("user:ag::w::i::s", "workspace:w", 0)], "workspace:w", 20);
    }

    #[test]
    fn an_expired_rule_leaves_it_to_the_next_tier() {
        let (me, resource) = (name("agent:ag::w::i::s"), name("workspace:w"));
        let mut rules = rules(&[]);
        rules.put(rule("agent:ag::w::i::s", "workspace:w", 0, Some(NOW - 1)));
        assert_eq!(rules.decide(&me, &resource, NOW).level, Level::READ_WRITE);
        assert_eq!(rules.decide(&me, &resource, NOW - 1).level, Level::NONE);
        assert!(rules.remove(&me, &resource).is_some() && rules.remove(&me, &resource).is_none());
        assert_eq!(rules.iter().count(), 0);
    }

    /// The tiers as the head of this file has them, rule by rule.
    fn decide_by_walking(rules: &[Rule], principal: &Name, resource: &Name) -> Level {
        let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::new() };
        let matches = |pattern: &Name, name: &Name| {
            glob::Pattern::new(&pattern.to_string()).is_ok_and(|p| p.matches_with(&name.to_string(), options))
        };
        let exact = |of: Option<&Name>, on: &Name| {
            let fits = |rule: &&Rule| !is_pattern(rule) && Some(&rule.principal) == of && rule.resource == *on;
            rules.iter().rev().find(fits).map(|rule| rule.level)
        };
        let any = Name::new(resource.kind.as_str(), "*");
        let all = everybody(&principal.kind);
        let patterns = rules.iter().enumerate().filter(|(at, rule)| {
            let is_last = !rules[at + 1..].iter().any(|r| r.principal == rule.principal && r.resource == rule.resource);
            is_last && is_pattern(rule) && matches(&rule.principal, principal) && matches(&rule.resource, resource)
        });
        exact(Some(principal), resource)
            .or_else(|| exact(all, resource))
            .or_else(|| exact(Some(principal), &any))
            .or_else(|| exact(all, &any))
            .or_else(|| patterns.map(|(_, rule)| rule.level).max())
            .unwrap_or(Level::NONE)
    }

    fn is_pattern(rule: &Rule) -> bool {
        rule.principal.has_wildcard() || rule.resource.has_wildcard()
    }

    /// Kinds and ids of principals that rules are about: literal, with wildcards, with classes, and some that are no patterns.
    const OF_KIND: &str = "(agent|user|wildcard|ag[*?]nt)";
    const OF_ID: &str = "([a/:é_*?]|any_agent|\\[ab\\]|\\*\\*/){0,5}";

    proptest::proptest! {
        #[test]
        fn the_index_decides_as_a_walk_over_all_rules(
            list in proptest::collection::vec((OF_KIND, OF_ID, "[vw]", "[ab/é*?]{0,4}|\\*", 0..6_i64), 0..30),
            asked in proptest::collection::vec(("(agent|user)", "[a/:éb]{0,5}", "[vw]", "[ab/é]{0,4}|\\*"), 1..20),
            removed in proptest::collection::vec(0..30_usize, 0..5),
        ) {
            let mut all = Vec::new();
            for (kind, id, on, on_id, level) in &list {
                let id = id.replace("any_agent", "_any_agent");
                let (principal, resource) = (format!("{kind}:{id}"), format!("{on}:{on_id}"));
                all.push(rule(&principal, &resource, level * 10, None));
            }
            let mut rules = Rules::default();
            all.iter().for_each(|each| rules.put(each.clone()));
            for at in removed {
                if let Some(gone) = all.get(at).cloned() {
                    rules.remove(&gone.principal, &gone.resource);
                    all.retain(|each| each.principal != gone.principal || each.resource != gone.resource);
                }
            }
            for (kind, id, on, on_id) in asked {
                let (principal, resource) = (Name::new(kind, id), Name::new(on, on_id));
                let decided = rules.decide(&principal, &resource, NOW).level;
                proptest::prop_assert_eq!(decided, decide_by_walking(&all, &principal, &resource));
            }
            proptest::prop_assert!(all.iter().all(|each| rules.get(&each.principal, &each.resource).is_some()));
        }
    }

    #[test]
    fn a_pattern_is_no_thing_that_another_pattern_matches() {
        let (me, rules) = (
            name("agent:ag::w::i::s"),
            rules(&[
                ("agent:ag::w::i::s", "workspace:team-?", 30),
                ("agent:ag::w::i::s", "workspace:?", 30),
                ("wildcard:_any_agent", "workspace:all-*", 40),
            ]),
        );
        let has = |id: &str| rules.decide_pattern(&me, &Name::new("workspace", id), NOW).number();
        assert_eq!([has("team-?"), has("team-*"), has("*"), has("all-*"), has("all-a*")], [30, 0, 0, 40, 0]);
    }

    #[test]
    fn patterns_that_cannot_be_read_are_refused() {
        for good in ["team-*", "team-[ab]?", "a[b", "*"] {
            check_pattern("resource_id", &Name::new("workspace", good)).unwrap();
        }
        for bad in ["team-[x*", "a***b", "?["] {
            assert!(check_pattern("resource_id", &Name::new("workspace", bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_that_cover_too_much_are_refused() {
        for good in ["ag::w::i::*", "ag::w::im*", "sv::x::*", "*", "_any_agent", "prod-*", "ag::w::i::s"] {
            check_breadth("principal_id", good).unwrap();
        }
        let refused = check_breadth("principal_id", "ag::w::*").unwrap_err();
        let expected =
            "principal_id glob pattern too broad: \"ag::w::*\" has 2 segment(s) before wildcard, minimum 3 required";
        assert_eq!(refused.message, expected);
        assert!(check_breadth("principal_id", "sv::*").is_err());
    }
}
