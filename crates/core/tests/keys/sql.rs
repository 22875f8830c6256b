//! Rows as earlier versions wrote them.

use trunkline_store::{Store, ledger};

/// A value and a set with two members, in a namespace.
pub(crate) async fn keep_as_before(store: &Store, namespace: &str) {
    let owner = namespace.to_owned();
    let kept = store.ledger.write(move |tx| {
        let owner = owner.clone();
        Box::pin(async move {
            let (owner, value) = (|| owner.as_str().into(), || b"old".as_slice().into());
            let keys = "INSERT INTO kv (owner, key, is_set, value, members, expires_ms)
                VALUES ($1, 'k', 0, $2, 0, NULL), ($1, 'set', 1, $2, 2, NULL)";
            tx.execute(keys, &[owner(), value()]).await?;
            let members = "INSERT INTO kv_members (owner, key, member) VALUES ($1, 'set', $2), ($1, 'set', $3)";
            tx.execute(members, &[owner(), value(), b"older".as_slice().into()]).await?;
            tx.execute("INSERT INTO kv_counts (owner, keys) VALUES ($1, 2)", &[owner()]).await?;
            Ok::<_, ledger::Error>(())
        })
    });
    kept.await.unwrap();
}

/// How many rows of namespaces there are, of each table.
pub(crate) async fn rows(store: &Store) -> [i64; 3] {
    let counted = store.ledger.read(|tx| {
        Box::pin(async move {
            let mut counts = [0; 3];
            let tables =
                ["SELECT COUNT(*) FROM kv", "SELECT COUNT(*) FROM kv_members", "SELECT COUNT(*) FROM kv_counts"];
            for (count, sql) in counts.iter_mut().zip(tables) {
                *count = tx.query_opt(sql, &[]).await?.unwrap().int(0)?;
            }
            Ok::<_, ledger::Error>(counts)
        })
    });
    counted.await.unwrap()
}
