//! Wall-clock times as the store and the operator see them: whole seconds since 1970, shown as RFC 3339 in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970-01-01T00:00:00Z; 0 if the clock stands before that.
pub fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|d| i64::try_from(d.as_secs()).ok())
        .unwrap_or(0)
}

/// [`now`], as `assay-evidence` counts.
pub fn unix_now() -> u64 {
    u64::try_from(now()).unwrap_or(0)
}

/// `2026-11-23T20:17:00Z`; times that do not fit a four-digit year are shown as their number.
pub fn rfc3339(seconds: i64) -> String {
    use ::time::format_description::well_known::Rfc3339;
    let formatted = ::time::OffsetDateTime::from_unix_timestamp(seconds)
        .ok()
        .and_then(|t| t.format(&Rfc3339).ok());
    formatted.unwrap_or_else(|| seconds.to_string())
}

#[cfg(test)]
mod tests {
    #[test]
    fn known_answers() {
        assert_eq!(super::rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(super::rfc3339(1_795_465_020), "2026-11-23T20:17:00Z");
    }
}
