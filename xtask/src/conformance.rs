//! The published Python client against `trunkline serve --dev`, black box.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use crate::{
    run::{Result, cargo, checked, output, root, target},
    tools,
};

/// Where the suite is.
const SUITE: &str = "conformance/aether-v1";

/// Our own stories with the same client, which start a server of their own.
const STORIES: &str = "conformance/trunkline";

/// Tests that later issues owe, one `file::test` a line.
const DESELECTED: &str = "conformance-deselected.txt";

/// The areas that are served so far.
const AREAS: [&str; 16] = [
    "test_admin.py",
    "test_audit.py",
    "test_checkpoints.py",
    "test_connect.py",
    "test_events_metrics.py",
    "test_handshake.py",
    "test_identity.py",
    "test_kv.py",
    "test_messaging.py",
    "test_offline_replay.py",
    "test_orchestration.py",
    "test_payloads_and_order.py",
    "test_permissions.py",
    "test_progress.py",
    "test_tasks.py",
    "test_workspace_switch.py",
];

pub(crate) fn run() -> Result {
    let suite = root().join(SUITE);
    let python = virtual_environment(&suite)?;
    checked(cargo(&["build", "--quiet", "--package", "trunkline"]))?;
    let data = tempfile::tempdir()?;
    let server = Server::start(data.path())?;
    let mut pytest = pytest(&python, &suite);
    pytest.arg("--runxfail").args(AREAS);
    for line in fs::read_to_string(root().join(DESELECTED))?.lines() {
        let test = line.split('#').next().unwrap_or_default().trim();
        if !test.is_empty() {
            pytest.args(["--deselect", test]);
        }
    }
    pytest.env("TRUNKLINE_GRPC", &server.grpc);
    checked(pytest)?;
    let mut pytest = self::pytest(&python, &root().join(STORIES));
    pytest.env("TRUNKLINE_BIN", target().join("debug/trunkline"));
    checked(pytest)?;
    let mut npm = Command::new("npm");
    npm.args(["test", "--silent"]).current_dir(node_story()?).env("TRUNKLINE_BIN", target().join("debug/trunkline"));
    checked(npm)
}

/// The stories with npm's EventSource, copied below `target` with what they ask for.
fn node_story() -> Result<PathBuf> {
    tools::node()?;
    let (from, dir) = (root().join(STORIES).join("eventsource"), target().join("eventsource-story"));
    fs::create_dir_all(&dir)?;
    let lock = "package-lock.json";
    let is_new = fs::read(from.join(lock))? != fs::read(dir.join(lock)).unwrap_or_default();
    for entry in fs::read_dir(&from)? {
        let entry = entry?;
        // The lock file comes last: it says that the rest is there.
        if entry.file_name() != lock {
            fs::copy(entry.path(), dir.join(entry.file_name()))?;
        }
    }
    if is_new {
        println!("installing npm's EventSource, once");
        fs::copy(from.join(lock), dir.join(lock))?;
        let mut install = Command::new("npm");
        install.args(["ci", "--silent"]).current_dir(&dir);
        output(install).inspect_err(|_| drop(fs::remove_file(dir.join(lock))))?;
    }
    Ok(dir)
}

fn pytest(python: &Path, dir: &Path) -> Command {
    let mut pytest = Command::new(python);
    pytest.args(["-m", "pytest", "-q", "-p", "no:cacheprovider"]).env("PYTHONDONTWRITEBYTECODE", "1").current_dir(dir);
    pytest
}

/// A virtual environment below `target` with what the suites ask for; made again when that changes.
fn virtual_environment(suite: &Path) -> Result<PathBuf> {
    let requirements = [suite.join("requirements.txt"), root().join(STORIES).join("requirements.txt")];
    let dir = target().join("conformance-venv");
    let (python, installed) = (dir.join("bin/python"), dir.join("requirements.txt"));
    let wanted = requirements.iter().map(fs::read_to_string).collect::<std::io::Result<String>>()?;
    if fs::read_to_string(&installed).is_ok_and(|have| have == wanted) {
        return Ok(python);
    }
    println!("installing the published client and moto's server, once");
    let mut venv = Command::new(tools::python()?);
    venv.args(["-m", "venv", "--clear"]).arg(&dir);
    checked(venv)?;
    let mut install = Command::new(&python);
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    for file in &requirements {
        install.arg("-r").arg(file);
    }
    output(install)?;
    fs::write(installed, wanted)?;
    Ok(python)
}

/// A server of our own on free ports; killed when dropped.
struct Server {
    child: Child,
    grpc: String,
}

impl Server {
    fn start(data: &Path) -> Result<Self> {
        let mut command = Command::new(target().join("debug/trunkline"));
        command.args(["serve", "--dev", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--ops", "127.0.0.1:0"]);
        command.arg("--data-dir").arg(data).stdout(Stdio::piped());
        // The suite expects the published quotas.
        command.env("TRUNKLINE__LIMITS__MESSAGES_PER_SECOND", "100").env("TRUNKLINE__LIMITS__MESSAGE_BURST", "200");
        command.env("TRUNKLINE__LIMITS__AUDIT_EVENTS_PER_SECOND", "100");
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().ok_or("the server has no output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let grpc = line.split_whitespace().find_map(|word| word.strip_prefix("grpc="));
        let grpc = grpc.ok_or_else(|| format!("the server did not get ready: {line:?}"))?.to_owned();
        Ok(Self { child, grpc })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be gone already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
