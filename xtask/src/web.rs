//! The browser SDK: its own tests, and its pages in a real browser, with a real server.

use std::{fs, process::Command};

use crate::{
    run::{Result, cargo, checked, root, target},
    tools,
};

pub(crate) fn run() -> Result {
    tools::node()?;
    let chromium = tools::chromium()?;
    checked(cargo(&["run", "--quiet", "--package", "trunkline-agent-socket", "--example", "quick_start"]))?;
    checked(cargo(&["build", "--quiet", "--package", "trunkline", "--bin", "trunkline"]))?;
    let runtime = ["--package", "trunkline-agent-socket", "--all-features", "--example", "runtime"];
    checked(cargo(&[&["build", "--quiet"], &runtime[..]].concat()))?;
    let page = root().join("crates/server/src/cli/demo/page.js");
    let shipped = fs::read(&page)?;
    let npm = |args: &[&str]| {
        let mut npm = Command::new("npm");
        npm.args(args).current_dir(root().join("sdk/web"));
        npm
    };
    let install = ["ci", "--no-fund", "--no-audit", "--loglevel=error"];
    checked(npm(&install))?;
    checked(npm(&["run", "--silent", "build"]))?;
    for args in [&install[..], &["run", "--silent", "build"]] {
        let mut example = npm(args);
        example.current_dir(root().join("sdk/web/examples/nextjs")).env("NEXT_TELEMETRY_DISABLED", "1");
        checked(example)?;
    }
    let mut test = npm(&["run", "--silent", "test:browser"]);
    let built = target().join("debug");
    test.env("TRUNKLINE_BIN", built.join("trunkline")).env("TRUNKLINE_CHROMIUM", chromium);
    test.env("TRUNKLINE_RUNTIME", built.join("examples").join("runtime"));
    // What is to be looked at is kept there.
    test.env("TRUNKLINE_SCREENSHOTS", target().join("screenshots"));
    checked(test)?;
    if fs::read(&page)? != shipped {
        return Err("the demo's page in the binary was not the one that sdk/web makes: commit what it is now".into());
    }
    Ok(())
}
