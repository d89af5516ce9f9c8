//! The address of a service.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use hyper::Uri;

use super::RemoteError;

/// `https://NAME[:PORT][/PATH]`, or the same with http, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    https: bool,
    /// Without brackets.
    host: String,
    port: u16,
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
        let loopback = self.host == "localhost" || self.ip().is_some_and(|ip| ip.is_loopback());
        self.https || loopback
    }

    /// DNS name, or IP address without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// TCP port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What stands before each path: empty, or a path without a slash at its end.
    #[must_use]
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Host and port, as in a request's `Host`.
    #[must_use]
    pub fn authority(&self) -> String {
        match self.ip() {
            Some(IpAddr::V6(ip)) => format!("[{ip}]:{}", self.port),
            _ => format!("{}:{}", self.host, self.port),
        }
    }

    fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.https { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.base)
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
        if authority.as_str().contains('@') {
            return Err(bad("it has a user or a password in it"));
        }
        if uri.query().is_some() || text.contains('#') {
            return Err(bad("it has more behind its path"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        // The reader of URLs takes any number of digits for a port, and then has none.
        let port = match authority.as_str().strip_prefix(authority.host()) {
            Some("") => Some(port),
            _ => authority.port_u16().filter(|port| *port != 0),
        };
        let port = port.ok_or_else(|| bad("its port is not a number from 1 to 65535"))?;
        if host.is_empty() {
            return Err(bad("it names no host"));
        }
        Ok(Self {
            https,
            host: host.to_owned(),
            port,
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
