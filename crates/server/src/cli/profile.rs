//! Profiles of servers, in a file: so that a command need not be told each time where the server is.
//!
//! ```toml
//! # ~/.config/trunkline/config.toml
//! [profiles.default]
//! server = "https://gateway.example.com:50051"
//! api_key = "tk_…"
//! ca = "/etc/trunkline/ca.pem"
//! ```

use std::{collections::BTreeMap, io, path::PathBuf};

use etcetera::{BaseStrategy as _, choose_base_strategy};
use serde::Deserialize;

type Error = Box<dyn std::error::Error>;

/// Where servers listen if nothing is said.
const SERVER: &str = "http://127.0.0.1:50051";

/// What a connection takes. A key in it is a reason to keep the file to oneself.
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Profile {
    pub(crate) server: Option<String>,
    pub(crate) api_key: Option<String>,
    pub(crate) ca: Option<PathBuf>,
}

impl Profile {
    pub(crate) fn server(&self) -> &str {
        self.server.as_deref().unwrap_or(SERVER)
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    profiles: BTreeMap<String, Profile>,
}

/// Where the file is: `TRUNKLINE_CLI_CONFIG`, or else where the system keeps such files.
fn path() -> Option<PathBuf> {
    let named = std::env::var_os("TRUNKLINE_CLI_CONFIG").map(PathBuf::from);
    named.or_else(|| Some(choose_base_strategy().ok()?.config_dir().join("trunkline").join("config.toml")))
}

/// A profile by its name; without one, the one called `default`, or nothing.
pub(crate) fn find(name: Option<&str>) -> Result<Profile, Error> {
    let Some(path) = path() else { return Ok(Profile::default()) };
    let shown = path.display();
    let file = match std::fs::read_to_string(&path) {
        Ok(text) => toml::from_str::<File>(&text).map_err(|e| format!("{shown}: {e}"))?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => File::default(),
        Err(e) => return Err(format!("{shown}: {e}").into()),
    };
    let found = file.profiles.get(name.unwrap_or("default")).cloned();
    match (found, name) {
        (Some(profile), _) => Ok(profile),
        (None, None) => Ok(Profile::default()),
        (None, Some(name)) => {
            let known: Vec<_> = file.profiles.keys().map(String::as_str).collect();
            Err(format!("{shown} has no profile {name:?}, but {known:?}").into())
        }
    }
}
