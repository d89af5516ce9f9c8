//! The address of a service.

use std::fmt;
use std::str::FromStr;

use assay_evidence::host_port::HostPort;
use hyper::Uri;

use super::RemoteError;

/// `https://NAME[:PORT][/PATH]`, or the same with http, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    https: bool,
    address: HostPort,
    /// Empty, or begins with a slash and ends with none.
    base: String,
}

impl Endpoint {
    /// Whether TLS is spoken.
    #[must_use]
    pub fn is_https(&self) -> bool {
        self.https
    }

    /// Whether what is said to it stays between the two: over TLS, or on this machine.
    #[must_use]
    pub fn is_private(&self) -> bool {
        let loopback = self.address.host() == "localhost" || self.address.ip().is_some_and(|ip| ip.is_loopback());
        self.https || loopback
    }

    /// Where it is. As text, as in a request's `Host`.
    #[must_use]
    pub fn address(&self) -> &HostPort {
        &self.address
    }

    /// What stands before each path: empty, or a path without a slash at its end.
    #[must_use]
    pub fn base(&self) -> &str {
        &self.base
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.https { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.address, self.base)
    }
}

impl FromStr for Endpoint {
    type Err = RemoteError;

    fn from_str(text: &str) -> Result<Self, RemoteError> {
        let bad = |why| RemoteError::Url {
            // A password in it would be printed.
            url: text.rsplit_once('@').map_or(text, |(_, rest)| rest).to_owned(),
            why,
        };
        let uri: Uri = text.parse().map_err(|_| bad("it is not a URL"))?;
        let (https, port) = match uri.scheme_str() {
            Some("https") => (true, 443),
            Some("http") => (false, 80),
            _ => return Err(bad("it starts with neither https:// nor http://")),
        };
        let authority = uri.authority().ok_or_else(|| bad("it names no host"))?;
        // The reader of URLs takes any number of digits for a port, and then has none.
        let address = HostPort::parse(authority.as_str(), Some(port)).map_err(|error| bad(error.why()))?;
        if uri.query().is_some() || text.contains('#') {
            return Err(bad("it has more behind its path"));
        }
        Ok(Self {
            https,
            address,
            base: uri.path().trim_end_matches('/').to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart_and_put_together_again() {
        for (text, shown, private) in [
            ("https://bao.example:8200", "https://bao.example:8200", true),
            ("https://bao.example/", "https://bao.example:443", true),
            ("http://127.0.0.1:8200/a/b/", "http://127.0.0.1:8200/a/b", true),
            ("http://localhost:80", "http://localhost:80", true),
            ("http://[::1]:8200", "http://[::1]:8200", true),
            ("http://images.example/x", "http://images.example:80/x", false),
            ("http://127.example", "http://127.example:80", false),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!((endpoint.to_string().as_str(), endpoint.is_private()), (shown, private));
        }
    }

    #[test]
    fn what_is_no_service_is_refused_and_no_password_is_shown() {
        for bad in [
            "",
            "bao.example",
            "ftp://a/",
            "https://",
            "https://a:0",
            "https://a:99999",
            "https://a/?x=1",
            "https://a/#x",
            "https://u:geheim@a",
        ] {
            let error = bad.parse::<Endpoint>().unwrap_err();
            assert!(matches!(error, RemoteError::Url { .. }), "{bad}");
            assert!(!error.to_string().contains("geheim"), "{error}");
        }
    }
}
