//! Where log lines go: the journal if we were started by systemd, else standard error.

use std::io::Write;

use env_filter::Filter;
use log::{Log, Metadata, Record};
use systemd_journal_logger::{JournalLog, connected_to_journal};

/// Sends records to the journal that pass the filter; the journal's own logger has none.
struct FilteredJournal {
    filter: Filter,
    journal: JournalLog,
}

impl Log for FilteredJournal {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if self.filter.matches(record) {
            self.journal.log(record);
        }
    }

    fn flush(&self) {
        self.journal.flush();
    }
}

/// Installs the process's logger. `level` is a filter such as `info` or `warn,engine=debug`.
///
/// # Errors
/// A filter that cannot be read, or a second installation.
pub(super) fn install(level: &str) -> Result<(), String> {
    let filter = env_filter::Builder::new()
        .try_parse(level)
        .map_err(|error| format!("log.level: {error}"))?
        .build();
    if connected_to_journal() {
        let journal = JournalLog::new()
            .map_err(|error| format!("journal: {error}"))?
            .with_extra_fields([("SCOUTD_VERSION", env!("CARGO_PKG_VERSION"))])
            .with_syslog_identifier("scoutd".to_owned());
        log::set_max_level(filter.filter());
        return log::set_boxed_logger(Box::new(FilteredJournal { filter, journal }))
            .map_err(|error| error.to_string());
    }
    env_logger::Builder::new()
        .parse_filters(level)
        .format(|out, record| {
            write!(out, "{:<5} {}: {}", record.level(), record.target(), record.args())?;
            record.key_values().visit(&mut KeyValues(out)).map_err(std::io::Error::other)?;
            writeln!(out)
        })
        .try_init()
        .map_err(|error| error.to_string())
}

/// Writes ` key=value` for each field of a record.
struct KeyValues<'a, W>(&'a mut W);

impl<'kvs, W: Write> log::kv::VisitSource<'kvs> for KeyValues<'_, W> {
    fn visit_pair(
        &mut self,
        key: log::kv::Key<'kvs>,
        value: log::kv::Value<'kvs>,
    ) -> Result<(), log::kv::Error> {
        write!(self.0, " {key}={value}")?;
        Ok(())
    }
}
