//! Until when something is approved.

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A moment, in seconds since 1970 (UTC); what has it is approved before it, and not from it on. Text form: RFC 3339, in
/// UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Expiry(u64);

impl Expiry {
    /// The last second of the year 9999, which is the last that RFC 3339 can write.
    pub const MAX: u64 = 253_402_300_799;

    /// The moment at this Unix time; none beyond [`Expiry::MAX`].
    #[must_use]
    pub const fn new(unix: u64) -> Option<Self> {
        if unix <= Self::MAX { Some(Self(unix)) } else { None }
    }

    /// Unix time.
    #[must_use]
    pub const fn unix(self) -> u64 {
        self.0
    }

    /// Whether it is past, at this Unix time.
    #[must_use]
    pub const fn is_past(self, now: u64) -> bool {
        now >= self.0
    }
}

/// A text that is no moment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no time: write it as 2027-01-31T00:00:00Z or 2027-01-31 (UTC), not before 1970")]
pub struct NotATime(String);

impl FromStr for Expiry {
    type Err = NotATime;

    fn from_str(text: &str) -> Result<Self, NotATime> {
        let refuse = || NotATime(text.chars().take(40).collect());
        let whole = if text.len() == "2027-01-31".len() {
            format!("{text}T00:00:00Z")
        } else {
            text.to_owned()
        };
        let moment = OffsetDateTime::parse(&whole, &Rfc3339).map_err(|_| refuse())?;
        u64::try_from(moment.unix_timestamp())
            .ok()
            .and_then(Self::new)
            .ok_or_else(refuse)
    }
}

impl fmt::Display for Expiry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither fails below `MAX`.
        let unix = i64::try_from(self.0).unwrap_or(i64::MAX);
        let moment = OffsetDateTime::from_unix_timestamp(unix).map_err(|_| fmt::Error)?;
        f.write_str(&moment.format(&Rfc3339).map_err(|_| fmt::Error)?)
    }
}

impl Serialize for Expiry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Expiry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let day: Expiry = "2027-01-31".parse().unwrap();
        assert_eq!(day.unix(), 1_801_353_600);
        assert_eq!(day.to_string(), "2027-01-31T00:00:00Z");
        assert_eq!(day.to_string().parse::<Expiry>().unwrap(), day);
        assert_eq!("2027-01-31T02:00:00+02:00".parse::<Expiry>().unwrap(), day);
        assert!(day.is_past(day.unix()) && !day.is_past(day.unix() - 1));
        let last = Expiry::new(Expiry::MAX).unwrap();
        assert_eq!(last.to_string(), "9999-12-31T23:59:59Z");
        assert_eq!(last.to_string().parse::<Expiry>().unwrap(), last);
        assert_eq!(Expiry::new(Expiry::MAX + 1), None);
    }

    #[test]
    fn what_is_no_time() {
        for text in [
            "",
            "tomorrow",
            "2027-02-30",
            "1969-12-31",
            "2027-01-31 00:00:00",
            "10000-01-01T00:00:00Z",
        ] {
            assert!(text.parse::<Expiry>().is_err(), "{text}");
        }
    }
}
