//! The programs that agents are instances of: how each is started, what it can do, which resources it names.

pub(crate) mod sql;

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use serde::{Deserialize, Serialize};

pub(crate) use sql::{MIGRATIONS, params};

use crate::{
    caller::Caller,
    error::{Error, Kind},
    gate::{Administer, Gate},
    identity::identifier,
    rule::now,
};

/// The launch parameter that says which orchestrators can start the program.
pub const PROFILE: &str = "profile";

/// Bytes of everything that is said of a program.
const BYTES_MAX: usize = 256 * 1024;

/// Entries of each list.
const ENTRIES_MAX: usize = 256;

/// A program that is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    /// Its name.
    pub implementation: String,
    /// For people.
    pub description: String,
    /// How it is started; [`PROFILE`] is among them.
    pub launch_params: BTreeMap<String, String>,
    /// The resources that it names.
    pub resources: Vec<ResourceSchema>,
    /// What it says that it can do.
    pub capabilities: BTreeMap<String, bool>,
    /// Extensions that it speaks.
    pub extensions: Vec<String>,
    /// Unix seconds.
    pub registered_at: i64,
    /// Unix seconds.
    pub updated_at: i64,
}

/// A kind of resource that a program names. One program has a prefix.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResourceSchema {
    /// How the types of its resources begin.
    pub prefix: String,
    /// What can be done to them.
    pub verbs: Vec<String>,
    /// How their ids look.
    pub id_schema: String,
}

/// The known programs. Clones share them.
#[derive(Clone)]
pub struct Registry {
    gate: Gate,
    known: Arc<Known>,
}

/// Looked at for every message to an agent.
#[derive(Default)]
struct Known {
    /// How many there are: most servers know few, many know none.
    count: AtomicUsize,
    names: Mutex<HashSet<String>>,
}

impl Registry {
    /// The programs that the ledger behind `gate` knows.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn open(gate: Gate) -> Result<Self, Error> {
        let all = gate.glance(sql::names).await?;
        let registry = Self { gate, known: Arc::default() };
        registry.change(|names| names.extend(all));
        Ok(registry)
    }

    /// Whether a program is known.
    #[must_use]
    pub fn knows(&self, implementation: &str) -> bool {
        if self.known.count.load(SeqCst) == 0 {
            return false;
        }
        let names = self.names();
        names.contains(implementation) || names.contains(plain(implementation))
    }

    /// All programs, by name; only those of a profile, if one is named.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::Unavailable`].
    pub async fn list(&self, caller: &Caller, profile: &str) -> Result<Vec<Program>, Error> {
        let permit = self.gate.authorize(caller, Administer("agents"))?;
        let mut all = self.gate.look(&permit, sql::all).await?;
        let is_of =
            |program: &Program| profile.is_empty() || program.launch_params.get(PROFILE).is_some_and(|p| p == profile);
        all.retain(is_of);
        Ok(all)
    }

    /// One program; what follows a colon in its name does not count.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::NotFound`], [`Kind::Unavailable`].
    pub async fn get(&self, caller: &Caller, implementation: &str) -> Result<Program, Error> {
        let permit = self.gate.authorize(caller, Administer("agents"))?;
        let name = implementation.to_owned();
        let found = self.gate.look(&permit, move |tx| sql::get(tx, name.clone())).await?;
        found.ok_or_else(|| missing(implementation))
    }

    /// The extensions that a program is registered with, looked up for the server itself; none if it is not known. What
    /// follows a colon in its name does not count.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn extensions(&self, implementation: &str) -> Result<Vec<String>, Error> {
        if !self.knows(implementation) {
            return Ok(Vec::new());
        }
        let name = implementation.to_owned();
        let found = self.gate.glance(move |tx| sql::get(tx, name.clone())).await?;
        Ok(found.map(|program| program.extensions).unwrap_or_default())
    }

    /// Puts a program in place of what was known of it.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::Invalid`], [`Kind::Exists`] if another program has one of its prefixes.
    pub async fn put(&self, caller: &Caller, program: Program) -> Result<(), Error> {
        self.gate.authorize(caller, Administer("agents"))?;
        let program = checked(program)?;
        let name = program.implementation.clone();
        let put = self.gate.housekeep(move |tx| sql::put(tx, program.clone()));
        match put.await.map_err(|e: trunkline_store::ledger::Error| Error::from(e))? {
            None => {
                self.change(|names| drop(names.replace(name)));
                Ok(())
            }
            Some((prefix, owner)) => Err(conflict(&prefix, &owner)),
        }
    }

    /// Forgets a program. Agents of it that run go on, and tasks for it wait.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::NotFound`], [`Kind::Unavailable`].
    pub async fn delete(&self, caller: &Caller, implementation: &str) -> Result<(), Error> {
        self.gate.authorize(caller, Administer("agents"))?;
        let name = implementation.to_owned();
        let gone = self.gate.housekeep(move |tx| sql::remove(tx, name.clone()));
        if !gone.await.map_err(|e: trunkline_store::ledger::Error| Error::from(e))? {
            return Err(missing(implementation));
        }
        self.change(|names| drop(names.take(implementation)));
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut HashSet<String>)) {
        let mut names = self.names();
        change(&mut names);
        self.known.count.store(names.len(), SeqCst);
    }

    fn names(&self) -> MutexGuard<'_, HashSet<String>> {
        // A panic while holding the lock cannot leave half a change: each section is one call of the set.
        self.known.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name without what follows its first colon.
fn plain(implementation: &str) -> &str {
    implementation.split(':').next().unwrap_or_default()
}

fn checked(mut program: Program) -> Result<Program, Error> {
    identifier("implementation", &program.implementation)?;
    if program.launch_params.get(PROFILE).is_none_or(String::is_empty) {
        return Err(invalid("launch_params must contain 'profile' field"));
    }
    program.resources.retain(|resource| !resource.prefix.is_empty());
    let mut seen = HashSet::new();
    if let Some(twice) = program.resources.iter().find(|resource| !seen.insert(&resource.prefix)) {
        return Err(conflict(&twice.prefix, "(self)"));
    }
    let lists = [program.resources.len(), program.capabilities.len(), program.extensions.len()];
    if lists.into_iter().any(|entries| entries > ENTRIES_MAX) || size(&program) > BYTES_MAX {
        return Err(invalid("an agent may have 256 entries of each kind and 256 KiB in all"));
    }
    (program.registered_at, program.updated_at) = (now(), now());
    Ok(program)
}

fn size(program: &Program) -> usize {
    let params: usize = program.launch_params.iter().map(|(key, value)| key.len() + value.len()).sum();
    let resources = program.resources.iter().map(|r| r.prefix.len() + r.id_schema.len() + r.verbs.concat().len());
    let rest = program.extensions.concat().len() + program.capabilities.keys().map(String::len).sum::<usize>();
    program.description.len() + params + resources.sum::<usize>() + rest
}

fn conflict(prefix: &str, owner: &str) -> Error {
    let message = format!("ERR_PREFIX_CONFLICT: resource_type_prefix {prefix:?} already declared by agent {owner:?}");
    Error::new(Kind::Exists, "ERR_PREFIX_CONFLICT", message)
}

fn invalid(message: &'static str) -> Error {
    Error::new(Kind::Invalid, "ERR_INVALID_ARGUMENT", message)
}

fn missing(implementation: &str) -> Error {
    let message = format!("agent implementation '{implementation}' not found in registry");
    Error::new(Kind::NotFound, "ERR_NOT_FOUND", message)
}
