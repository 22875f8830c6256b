//! Rules with wildcards: compiled when they are made, and found by how their patterns begin.
//!
//! What a pattern says before its first wildcard has to be how a name begins. Patterns lie under that, for principals and within
//! that for resources, so that a look-up tries those alone that begin as the names do, however many there are.

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Included, Unbounded},
    sync::Arc,
};

use super::{Name, Rule};

/// Rules of which a name has wildcards.
#[derive(Clone, Debug, Default)]
pub(super) struct Patterns {
    rules: BTreeMap<(Name, Name), Arc<Compiled>>,
    index: Prefixes<Prefixes<Vec<Arc<Compiled>>>>,
}

/// A rule, and its names as patterns.
#[derive(Debug)]
struct Compiled {
    rule: Rule,
    principal: Fits,
    resource: Fits,
}

impl Compiled {
    fn new(rule: Rule) -> Self {
        let [principal, resource] = [&rule.principal, &rule.resource].map(|name| Fits::new(&text(name)));
        Self { rule, principal, resource }
    }

    /// Whether names fit that begin as its patterns do.
    fn matches(&self, principal: &str, resource: &str) -> bool {
        self.principal.has(principal) && self.resource.has(resource)
    }
}

/// Which of the names that begin as a pattern does fit it. Most patterns end with their one wildcard.
#[derive(Debug)]
enum Fits {
    /// The pattern itself: it has no wildcard, and this length in bytes.
    One(usize),
    /// Names without a separator behind the literal part, of which this is the length in bytes.
    Segment(usize),
    /// Any other pattern.
    Glob(glob::Pattern),
    /// It is no pattern.
    Nothing,
}

impl Fits {
    fn new(pattern: &str) -> Self {
        let begins = literal(pattern).len();
        match (&pattern[begins..], glob::Pattern::new(pattern)) {
            (_, Err(_)) => Self::Nothing,
            ("", _) => Self::One(begins),
            ("*", _) => Self::Segment(begins),
            (_, Ok(pattern)) => Self::Glob(pattern),
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::One(length) => name.len() == *length,
            Self::Segment(begins) => !name[*begins..].contains(std::path::MAIN_SEPARATOR),
            Self::Glob(pattern) => {
                let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::new() };
                pattern.matches_with(name, options)
            }
            Self::Nothing => false,
        }
    }
}

/// A name as it is displayed, without the cost of formatting: every decision makes two.
fn text(name: &Name) -> String {
    [&name.kind, ":", &name.id].concat()
}

/// What stands before the first wildcard of a pattern.
fn literal(pattern: &str) -> &str {
    pattern.find(['*', '?', '[']).map_or(pattern, |at| &pattern[..at])
}

impl Patterns {
    pub(super) fn put(&mut self, rule: Rule) {
        self.remove(&rule.principal, &rule.resource);
        let (principal, resource) = (text(&rule.principal), text(&rule.resource));
        let (key, compiled) = ((rule.principal.clone(), rule.resource.clone()), Arc::new(Compiled::new(rule)));
        self.index.under(literal(&principal)).under(literal(&resource)).push(compiled.clone());
        self.rules.insert(key, compiled);
    }

    pub(super) fn remove(&mut self, principal: &Name, resource: &Name) -> Option<Rule> {
        let removed = self.rules.remove(&(principal.clone(), resource.clone()))?;
        let (of, on) = (text(principal), text(resource));
        let (of, on) = (literal(&of), literal(&on));
        self.index.change(of, |resources| {
            resources.change(on, |rules| {
                rules.retain(|other| !Arc::ptr_eq(other, &removed));
                rules.is_empty()
            });
            resources.0.is_empty()
        });
        Some(removed.rule.clone())
    }

    pub(super) fn get(&self, principal: &Name, resource: &Name) -> Option<&Rule> {
        if self.rules.is_empty() {
            return None;
        }
        self.rules.get(&(principal.clone(), resource.clone())).map(|compiled| &compiled.rule)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Rule> {
        self.rules.values().map(|compiled| &compiled.rule)
    }

    /// The rule with the highest level of those that fit both names and are live.
    pub(super) fn best(&self, principal: &Name, resource: &Name, live: impl Fn(&Rule) -> bool) -> Option<&Rule> {
        if self.rules.is_empty() {
            return None;
        }
        let (principal, resource) = (text(principal), text(resource));
        let mut best: Option<&Rule> = None;
        self.candidates(&principal, &resource, |compiled| {
            let rule = &compiled.rule;
            let is_better = best.is_none_or(|best| rule.level > best.level);
            if is_better && live(rule) && compiled.matches(&principal, &resource) {
                best = Some(rule);
            }
        });
        best
    }

    /// Those whose patterns begin as the names do.
    fn candidates<'a>(&'a self, principal: &str, resource: &str, mut each: impl FnMut(&'a Compiled)) {
        self.index.each_before(principal, |resources| {
            resources.each_before(resource, |rules| rules.iter().for_each(|rule| each(rule)));
        });
    }
}

/// Values under texts, found by all that a text begins with.
#[derive(Clone, Debug)]
struct Prefixes<T>(BTreeMap<Box<str>, T>);

impl<T> Default for Prefixes<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Default> Prefixes<T> {
    fn under(&mut self, prefix: &str) -> &mut T {
        self.0.entry(prefix.into()).or_default()
    }

    /// Changes what lies under a prefix, and forgets it if it is empty then.
    fn change(&mut self, prefix: &str, change: impl FnOnce(&mut T) -> bool) {
        if self.0.get_mut(prefix).is_some_and(change) {
            self.0.remove(prefix);
        }
    }
}

impl<T> Prefixes<T> {
    /// Every value under something that `text` begins with, the longest first. Between two texts that begin `text`, each look-up
    /// passes over all that share less with it.
    fn each_before<'a>(&'a self, text: &str, mut each: impl FnMut(&'a T)) {
        let mut upper = Included(text);
        while let Some((prefix, value)) = self.0.range::<str, _>((Unbounded, upper)).next_back() {
            let common = common(prefix, text);
            upper = if common == prefix.len() {
                each(value);
                Excluded(&text[..common])
            } else {
                Included(&text[..common])
            };
        }
    }
}

/// Length of what both begin with, in whole characters.
fn common(one: &str, other: &str) -> usize {
    let same = one.bytes().zip(other.bytes()).take_while(|(one, other)| one == other).count();
    (0..=same).rev().find(|at| other.is_char_boundary(*at) && one.is_char_boundary(*at)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::Level, Fits, Name, Patterns, Prefixes, Rule, literal};

    fn rule(principal: &str, resource: &str, level: i64) -> Rule {
        Rule {
            id: String::new(),
            principal: Name::new("agent", principal),
            resource: Name::new("workspace", resource),
            level: Level::new(level).unwrap(),
            granted_by: String::new(),
            granted_at: 0,
            expires_at: None,
            reason: String::new(),
        }
    }

    #[test]
    fn every_beginning_of_a_text_is_found_and_nothing_else() {
        let mut prefixes = Prefixes::<usize>::default();
        for (n, text) in ["", "a", "ab", "aba", "abc", "abcd", "ac", "ä", "b"].into_iter().enumerate() {
            *prefixes.under(text) = n;
        }
        let found = |text: &str| {
            let mut found = Vec::new();
            prefixes.each_before(text, |n| found.push(*n));
            found
        };
        assert_eq!(found("abcx"), [4, 2, 1, 0]);
        assert_eq!(found("abb"), [2, 1, 0]);
        assert_eq!(found("äx"), [7, 0]);
        assert_eq!(found("ö"), [0], "shares a byte with what is there, and no character");
        assert_eq!(found("c"), [0]);
        assert_eq!(found(""), [0]);
    }

    proptest! {
        #[test]
        fn a_pattern_fits_what_it_always_did(pattern in "[ab/*?\\[\\]!-]{0,8}", name in "[ab/ä]{0,6}") {
            let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::new() };
            let expected = glob::Pattern::new(&pattern).is_ok_and(|pattern| pattern.matches_with(&name, options));
            prop_assert_eq!(name.starts_with(literal(&pattern)) && Fits::new(&pattern).has(&name), expected);
        }
    }

    #[test]
    fn few_patterns_are_tried_of_many() {
        let mut patterns = Patterns::default();
        for n in 0..200 {
            patterns.put(rule(&format!("ag::w::program-{n:03}::*"), &format!("team-{n:03}-*"), 20));
            patterns.put(rule("ag::w::one::*", &format!("team-{n:03}-?"), 20));
        }
        for (principal, resource, most) in
            [("ag::w::program-117::x", "team-117-a", 1), ("ag::w::one::x", "team-117-a", 1), ("ag::w::two::x", "t", 0)]
        {
            let (mut tried, of) = (0, Name::new("agent", principal));
            let on = Name::new("workspace", resource);
            patterns.candidates(&of.to_string(), &on.to_string(), |_| tried += 1);
            assert_eq!(tried, most, "{principal} on {resource}");
            assert_eq!(patterns.best(&of, &on, |_| true).is_some(), most == 1);
        }
    }

    #[test]
    fn a_rule_that_is_replaced_or_removed_fits_no_more() {
        let mut patterns = Patterns::default();
        patterns.put(rule("ag::w::i::*", "w", 40));
        patterns.put(rule("ag::w::i::*", "w", 10));
        let (of, on) = (Name::new("agent", "ag::w::i::s"), Name::new("workspace", "w"));
        assert_eq!(patterns.best(&of, &on, |_| true).map(|rule| rule.level), Some(Level::READ));
        assert!(patterns.remove(&Name::new("agent", "ag::w::i::*"), &on).is_some());
        assert!(patterns.best(&of, &on, |_| true).is_none() && patterns.index.0.is_empty());
    }
}
