//! QEMU's machine protocol (QMP): one JSON object a line.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::HarnessError;

/// A connection to a machine's monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects and agrees on capabilities.
    ///
    /// # Errors
    /// [`HarnessError::Io`] when QEMU is not there (yet).
    pub fn connect(path: &Path) -> Result<Self, HarnessError> {
        let action = || format!("connect to QEMU at {}", path.display());
        let stream = UnixStream::connect(path).map_err(HarnessError::io(action()))?;
        // A snapshot of a large machine on a slow disk is the longest thing that is asked for.
        stream
            .set_read_timeout(Some(Duration::from_secs(120)))
            .map_err(HarnessError::io(action()))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
        };
        qmp.read()?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Executes one command and gives its `return` value.
    ///
    /// # Errors
    /// [`HarnessError::Guest`] with QEMU's words when it refuses.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, HarnessError> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        let action = || format!("ask QEMU to {command}");
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .map_err(HarnessError::io(action()))?;
        loop {
            let mut answer = self.read()?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let message = error
                    .get("desc")
                    .and_then(Value::as_str)
                    .unwrap_or("no reason given")
                    .to_owned();
                return Err(HarnessError::Guest {
                    request: command.to_owned(),
                    message,
                });
            }
            // An event; nobody waits for those.
        }
    }

    /// Executes a command of the human monitor, which answers with text only when something is wrong.
    ///
    /// # Errors
    /// [`HarnessError::Guest`] with that text.
    pub fn monitor(&mut self, line: &str) -> Result<(), HarnessError> {
        let answer = self.execute("human-monitor-command", &json!({"command-line": line}))?;
        match answer.as_str().map(str::trim) {
            None | Some("") => Ok(()),
            Some(text) => Err(HarnessError::Guest {
                request: line.to_owned(),
                message: text.to_owned(),
            }),
        }
    }

    fn read(&mut self) -> Result<Value, HarnessError> {
        let mut line = String::new();
        self.stream
            .read_line(&mut line)
            .map_err(HarnessError::io("read QEMU's answer"))?;
        serde_json::from_str(&line).map_err(|error| HarnessError::Io {
            action: "read QEMU's answer".to_owned(),
            source: error.into(),
        })
    }
}
