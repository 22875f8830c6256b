//! Everything in which the engines' SQL differs.

/// The words of a migration that stand for something else on each engine.
pub(super) fn sqlite_schema(sql: &str) -> String {
    let words = [("AUTO_ID", "INTEGER PRIMARY KEY AUTOINCREMENT"), ("BYTES", "BLOB"), ("SORTED_TEXT", "TEXT")];
    replace_words(sql, &words)
}

/// The same for PostgreSQL.
pub(super) fn postgres_schema(sql: &str) -> String {
    let words = [
        ("AUTO_ID", "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY"),
        ("BYTES", "BYTEA"),
        // The database's own collation may sort otherwise.
        ("SORTED_TEXT", "TEXT COLLATE \"C\""),
    ];
    replace_words(sql, &words)
}

/// SQLite takes `$1` for a name and numbers names as they come; `?1` is a number.
pub(super) fn sqlite_statement(sql: &str) -> String {
    sql.replace('$', "?")
}

fn replace_words(sql: &str, words: &[(&str, &str)]) -> String {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut out = String::with_capacity(sql.len() + 64);
    let mut rest = sql;
    while let Some(start) = rest.find(is_word) {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        let word = &rest[..end];
        out.push_str(words.iter().find(|(from, _)| *from == word).map_or(word, |(_, to)| to));
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::{sqlite_schema, sqlite_statement};

    #[test]
    fn words_are_replaced_whole() {
        assert_eq!(sqlite_schema("a BYTES, MYBYTES x, BYTES_2 y"), "a BLOB, MYBYTES x, BYTES_2 y");
        assert_eq!(sqlite_schema("(id AUTO_ID)"), "(id INTEGER PRIMARY KEY AUTOINCREMENT)");
        assert_eq!(sqlite_statement("a = $2 AND b = $1"), "a = ?2 AND b = ?1");
    }
}
