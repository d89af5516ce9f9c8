//! Text in events, as ASCII (UTF-8) or UTF-16. It is a stranger's: it is shown quoted, cut, and with everything escaped
//! that is not printable.

/// Longest text that is shown, in characters: the kernel takes a command line of 2,048 bytes, a menu entry can be longer.
pub(super) const TEXT: usize = 1024;
/// How many bytes of data that is no text are shown.
pub(super) const HEX: usize = 32;

/// The text that these bytes are, in whichever of the two encodings, without closing NULs; `None` if they are no text.
pub(super) fn decode(data: &[u8]) -> Option<String> {
    utf8(data).or_else(|| utf16(data))
}

/// Text in UTF-8, with at most closing NULs, of at least two characters: one alone is more often a number.
fn utf8(data: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(data).ok()?.trim_end_matches('\0');
    (text.len() >= 2 && text.chars().all(printable)).then(|| text.to_owned())
}

/// Text in UTF-16, little-endian, with at most closing NULs. Nearly any two bytes are a character of it, so text has more
/// ASCII than other characters.
pub(super) fn utf16(data: &[u8]) -> Option<String> {
    if !data.len().is_multiple_of(2) {
        return None;
    }
    let units = data.chunks_exact(2).map(|pair| match pair {
        [low, high] => u16::from_le_bytes([*low, *high]),
        _ => 0,
    });
    let text: String = char::decode_utf16(units).collect::<Result<_, _>>().ok()?;
    let text = text.trim_end_matches('\0');
    let (ascii, other): (Vec<char>, Vec<char>) = text.chars().partition(char::is_ascii);
    (ascii.len() > other.len() && text.chars().all(printable)).then(|| text.to_owned())
}

/// Text in UTF-16, little-endian, with a closing NUL: what UEFI's load options are.
pub(super) fn to_utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
}

/// Characters that text of a boot has: scripts of boot loaders have lines and tabs.
fn printable(c: char) -> bool {
    !c.is_control() || matches!(c, '\n' | '\t')
}

/// In quotes, escaped and cut.
pub(super) fn quoted(text: &str) -> String {
    let cut: String = text.chars().take(TEXT).collect();
    let more = if cut.len() < text.len() { "…" } else { "" };
    format!("\"{}{more}\"", escaped(&cut))
}

/// Escaped and cut, without quotes: names.
pub(super) fn plain(text: &str) -> String {
    let cut: String = text.chars().take(TEXT).collect();
    escaped(&cut)
}

/// A backslash stays one (paths of UEFI are full of them); characters that could move a terminal's cursor, or turn the
/// direction of writing, do not pass.
fn escaped(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\\' | '\'' => c.to_string(),
            c => c.escape_debug().to_string(),
        })
        .collect()
}

/// Data in short: as text if it is text, else as hexadecimal.
pub(super) fn summary(data: &[u8]) -> String {
    match decode(data) {
        Some(text) => quoted(&text),
        None => hex_of(data),
    }
}

/// The first bytes in hexadecimal, and how many there are if those are not all.
pub(super) fn hex_of(data: &[u8]) -> String {
    let shown = hex::encode(data.get(..HEX.min(data.len())).unwrap_or_default());
    if data.len() > HEX {
        format!("{shown}… ({} bytes)", data.len())
    } else {
        shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_in_short() {
        assert_eq!(summary(b""), "");
        assert_eq!(summary(b"Exit Boot Services"), "\"Exit Boot Services\"");
        assert_eq!(summary(b"grub_cmd: linux\0"), "\"grub_cmd: linux\"");
        assert_eq!(summary(&[0, 0, 0, 0]), "00000000");
        assert_eq!(summary(b"\x1b[2Jevil"), "1b5b324a6576696c");
        assert_eq!(summary(b"G\0C\0E\0"), "\"GCE\"");
        assert_eq!(summary(b"a {\n  b\n}"), "\"a {\\n  b\\n}\"");
        assert!(summary(&[7; 100]).ends_with("… (100 bytes)"));
        assert!(summary(&[b'x'; TEXT + 1]).ends_with("…\""));
        assert_eq!(summary("\u{202e}live".as_bytes()), "\"\\u{202e}live\"");
    }

    #[test]
    fn utf16_there_and_back() {
        assert_eq!(to_utf16("a"), [b'a', 0, 0, 0]);
        assert_eq!(utf16(&to_utf16("root=/dev/vda ü")).unwrap(), "root=/dev/vda ü");
        assert_eq!(utf16(&[0, 0]), None);
        assert_eq!(utf16(b"\x1e\xfbkT\x0c\x1dU@\xa4\xadN\xf4\xbf\x17\xb8:"), None);
        assert_eq!(utf16(&[0x00, 0xD8, 0x61, 0]), None);
    }
}
