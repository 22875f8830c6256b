//! The ledger's suite on each back end.

#![allow(clippy::unwrap_used, reason = "test code")]

mod sqlite {
    use trunkline_store::{
        conformance::ledger::Home,
        ledger::{Error, Ledger, Migration, Options},
        ledger_suite,
    };

    struct InFile(tempfile::TempDir);

    impl Home for InFile {
        async fn open(&self, migrations: &'static [Migration]) -> Result<Ledger, Error> {
            Ledger::open_sqlite(&self.0.path().join("ledger.sqlite"), migrations, Options::default())
        }
    }

    ledger_suite!(InFile(tempfile::tempdir().unwrap()));
}
