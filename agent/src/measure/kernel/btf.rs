//! The running kernel's own description of its structures (BTF): just enough of a reader to find members and
//! enumerators by name.
//!
//! Format: Documentation/bpf/btf.rst of the kernel. The file comes from the kernel, or from a path in a test: every
//! length in it is checked, and nothing in it can make the reader panic, recurse without end or allocate beyond its size.

use std::cell::RefCell;
use std::collections::HashMap;

/// How deep anonymous structures may be nested in one another; the kernel's are four deep.
const NESTING_LIMIT: u32 = 16;

/// Why a structure's member or an enumerator could not be found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BtfError {
    /// The first bytes are not those of a BTF file of this machine's byte order.
    #[error("not a BTF file: its first bytes are not the magic number 0xeb9f")]
    NotBtf,
    /// A length in the file points past its end.
    #[error("BTF file is cut short at byte {at}")]
    Short {
        /// Where the missing bytes should begin.
        at: usize,
    },
    /// A type of a kind that this reader cannot step over.
    #[error("BTF type {id} is of kind {kind}, which this version does not know")]
    UnknownKind {
        /// Number of the type.
        id: usize,
        /// Its kind.
        kind: u32,
    },
    /// No structure of this name.
    #[error("the kernel has no struct {name}")]
    NoStruct {
        /// The structure's name.
        name: String,
    },
    /// The structure has no such member.
    #[error("the kernel's struct {structure} has no member {member}")]
    NoMember {
        /// The structure's name.
        structure: String,
        /// The member's name or dotted path.
        member: String,
    },
    /// The member is a bit field, which has no byte offset.
    #[error("{structure}.{member} is a bit field")]
    BitField {
        /// The structure's name.
        structure: String,
        /// The member's dotted path.
        member: String,
    },
    /// No enumerator of this name in an enumeration of this name.
    #[error("the kernel's enum {enumeration} has no {name}")]
    NoEnumerator {
        /// The enumeration's name.
        enumeration: String,
        /// The enumerator's name.
        name: String,
    },
}

const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FWD: u32 = 7;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_FLOAT: u32 = 16;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// Bytes of the part that all types share: name, info, size or type.
const TYPE_HEADER: usize = 12;
/// Bytes of one member of a structure: name, type, offset.
const MEMBER: usize = 12;
/// Bytes of one enumerator: name, value.
const ENUMERATOR: usize = 8;

/// A BTF file, indexed by type number.
#[derive(Debug)]
pub struct Btf {
    bytes: Vec<u8>,
    /// Where the strings begin and end.
    strings: (usize, usize),
    /// Where each type begins; number 0 is `void` and begins nowhere.
    types: Vec<usize>,
    /// What was looked for already.
    found: RefCell<HashMap<(u32, String), Option<usize>>>,
}

/// The shared part of a type.
#[derive(Clone, Copy)]
struct Header {
    name: usize,
    kind: u32,
    /// Number of members, enumerators or parameters.
    count: usize,
    /// Member offsets carry a bit-field size in their upper byte.
    bit_fields: bool,
    /// The type that this one refers to, in kinds that refer to one.
    target: usize,
    /// Where what follows the header begins.
    body: usize,
}

impl Btf {
    /// Indexes a BTF file.
    ///
    /// # Errors
    /// [`BtfError::NotBtf`], [`BtfError::Short`], [`BtfError::UnknownKind`].
    pub fn parse(bytes: Vec<u8>) -> Result<Self, BtfError> {
        if bytes.get(..2) != Some(0xeb9f_u16.to_ne_bytes().as_slice()) {
            return Err(BtfError::NotBtf);
        }
        let header = word(&bytes, 4)?;
        let section = |offset: usize, length: usize| -> Result<(usize, usize), BtfError> {
            let start = header.saturating_add(word(&bytes, offset)?);
            let end = start.saturating_add(word(&bytes, length)?);
            if end > bytes.len() {
                Err(BtfError::Short { at: bytes.len() })
            } else {
                Ok((start, end))
            }
        };
        let (mut at, end) = section(8, 12)?;
        let strings = section(16, 20)?;
        let mut btf = Self {
            bytes,
            strings,
            types: vec![0],
            found: RefCell::default(),
        };
        while at < end {
            let id = btf.types.len();
            let header = btf.header_at(at)?;
            btf.types.push(at);
            at = header.body.saturating_add(body_length(id, &header)?);
        }
        Ok(btf)
    }

    /// Byte offset of a member of a structure. `path` may lead through embedded structures (`a.b`); members of
    /// anonymous structures and unions count as the outer structure's own, as in C.
    ///
    /// # Errors
    /// [`BtfError::NoStruct`], [`BtfError::NoMember`], [`BtfError::BitField`], [`BtfError::Short`].
    pub fn member(&self, structure: &str, path: &str) -> Result<u32, BtfError> {
        let missing = || BtfError::NoMember {
            structure: structure.to_owned(),
            member: path.to_owned(),
        };
        let mut of = self.named(KIND_STRUCT, structure)?.ok_or_else(|| BtfError::NoStruct {
            name: structure.to_owned(),
        })?;
        let mut bits = 0_u32;
        for name in path.split('.') {
            let (offset, target) = self.member_of(of, name, NESTING_LIMIT)?.ok_or_else(missing)?;
            bits = bits.checked_add(offset).ok_or_else(missing)?;
            of = target;
        }
        if bits.is_multiple_of(8) {
            Ok(bits / 8)
        } else {
            Err(BtfError::BitField {
                structure: structure.to_owned(),
                member: path.to_owned(),
            })
        }
    }

    /// Whether the kernel has a function of this name.
    ///
    /// # Errors
    /// [`BtfError::Short`].
    pub fn has_function(&self, name: &str) -> Result<bool, BtfError> {
        Ok(self.named(KIND_FUNC, name)?.is_some())
    }

    /// Value of an enumerator.
    ///
    /// # Errors
    /// [`BtfError::NoEnumerator`], [`BtfError::Short`].
    pub fn enumerator(&self, enumeration: &str, name: &str) -> Result<u32, BtfError> {
        if let Some(id) = self.named(KIND_ENUM, enumeration)? {
            let header = self.header(id)?;
            for index in 0..header.count {
                let at = header.body.saturating_add(index * ENUMERATOR);
                if self.string(word(&self.bytes, at)?) == name.as_bytes() {
                    return word32(&self.bytes, at.saturating_add(4));
                }
            }
        }
        Err(BtfError::NoEnumerator {
            enumeration: enumeration.to_owned(),
            name: name.to_owned(),
        })
    }

    /// The first type of this kind and name. A kernel has more than 100,000 types, and most questions are about a few.
    fn named(&self, kind: u32, name: &str) -> Result<Option<usize>, BtfError> {
        let key = (kind, name.to_owned());
        if let Some(id) = self.found.borrow().get(&key) {
            return Ok(*id);
        }
        let id = self.look_for(kind, name)?;
        self.found.borrow_mut().insert(key, id);
        Ok(id)
    }

    fn look_for(&self, kind: u32, name: &str) -> Result<Option<usize>, BtfError> {
        for id in 1..self.types.len() {
            let header = self.header(id)?;
            if header.kind == kind && self.string(header.name) == name.as_bytes() {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }

    /// Offset in bits and type of a member, looked for in anonymous structures as well.
    fn member_of(&self, id: usize, name: &str, depth: u32) -> Result<Option<(u32, usize)>, BtfError> {
        let header = self.header(self.resolved(id)?)?;
        if depth == 0 || !matches!(header.kind, KIND_STRUCT | KIND_UNION) {
            return Ok(None);
        }
        for index in 0..header.count {
            let at = header.body.saturating_add(index * MEMBER);
            let called = self.string(word(&self.bytes, at)?);
            let target = word(&self.bytes, at.saturating_add(4))?;
            let offset = word32(&self.bytes, at.saturating_add(8))?;
            let offset = if header.bit_fields {
                offset & 0x00ff_ffff
            } else {
                offset
            };
            if called == name.as_bytes() {
                return Ok(Some((offset, target)));
            }
            if called.is_empty()
                && let Some((inner, target)) = self.member_of(target, name, depth - 1)?
            {
                return Ok(offset.checked_add(inner).map(|bits| (bits, target)));
            }
        }
        Ok(None)
    }

    /// Follows typedefs and qualifiers.
    fn resolved(&self, mut id: usize) -> Result<usize, BtfError> {
        for _ in 0..NESTING_LIMIT {
            let header = self.header(id)?;
            match header.kind {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                    id = header.target;
                }
                _ => break,
            }
        }
        Ok(id)
    }

    fn header(&self, id: usize) -> Result<Header, BtfError> {
        match self.types.get(id) {
            Some(at) if id > 0 => self.header_at(*at),
            // `void`, or a number that the file does not have: a type without members.
            _ => Ok(Header {
                name: 0,
                kind: 0,
                count: 0,
                bit_fields: false,
                target: 0,
                body: 0,
            }),
        }
    }

    fn header_at(&self, at: usize) -> Result<Header, BtfError> {
        let info = word32(&self.bytes, at.saturating_add(4))?;
        Ok(Header {
            name: word(&self.bytes, at)?,
            kind: (info >> 24) & 0x1f,
            count: usize::from(u16::try_from(info & 0xffff).unwrap_or(u16::MAX)),
            bit_fields: info >> 31 == 1,
            target: word(&self.bytes, at.saturating_add(8))?,
            body: at.saturating_add(TYPE_HEADER),
        })
    }

    /// A string by its offset; one that the file does not have is empty.
    fn string(&self, offset: usize) -> &[u8] {
        let (start, end) = self.strings;
        self.bytes
            .get(start.saturating_add(offset)..end)
            .and_then(|rest| rest.split(|byte| *byte == 0).next())
            .unwrap_or(&[])
    }
}

/// Bytes that follow a type's header.
fn body_length(id: usize, header: &Header) -> Result<usize, BtfError> {
    Ok(match header.kind {
        KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
        KIND_ARRAY => 12,
        KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => header.count * MEMBER,
        KIND_ENUM | KIND_FUNC_PROTO => header.count * ENUMERATOR,
        KIND_PTR | KIND_FWD | KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_FUNC | KIND_FLOAT
        | KIND_TYPE_TAG => 0,
        kind => return Err(BtfError::UnknownKind { id, kind }),
    })
}

fn word32(bytes: &[u8], at: usize) -> Result<u32, BtfError> {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map(|chunk| u32::from_ne_bytes(*chunk))
        .ok_or(BtfError::Short { at })
}

fn word(bytes: &[u8], at: usize) -> Result<usize, BtfError> {
    word32(bytes, at).and_then(|word| usize::try_from(word).map_err(|_| BtfError::Short { at }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with `types` and `strings`, as the kernel lays it out.
    fn file(types: &[u32], strings: &[u8]) -> Vec<u8> {
        let length = |bytes: usize| u32::try_from(bytes).unwrap();
        let mut out = Vec::new();
        out.extend(0xeb9f_u16.to_ne_bytes());
        out.extend([1, 0]);
        let types_length = length(types.len() * 4);
        for word in [24, 0, types_length, types_length, length(strings.len())] {
            out.extend(word.to_ne_bytes());
        }
        out.extend(types.iter().flat_map(|word| word.to_ne_bytes()));
        out.extend(strings);
        out
    }

    const STRINGS: &[u8] = b"\0inode\0i_ino\0i_nlink\0ts\0sec\0nsec\0flag\0ids\0NONE\0MODULE\0";

    fn name(wanted: &str) -> u32 {
        let text = [b"\0".as_slice(), wanted.as_bytes(), b"\0"].concat();
        let at = STRINGS.windows(text.len()).position(|window| window == text).unwrap();
        u32::try_from(at + 1).unwrap()
    }

    /// struct inode { int i_ino; union { int i_nlink; }; const ts_t ts; int flag:3; }; enum ids { NONE, MODULE = 2 };
    fn sample() -> Vec<u8> {
        let types = [
            // 1: int
            &[0, KIND_INT << 24, 4, 32][..],
            // 2: struct inode, with bit-field offsets
            &[name("inode"), 1 << 31 | KIND_STRUCT << 24 | 4, 32],
            &[
                name("i_ino"),
                1,
                0,
                0,
                3,
                64,
                name("ts"),
                4,
                128,
                name("flag"),
                1,
                3 << 24 | 193,
            ],
            // 3: union { int i_nlink; }
            &[0, KIND_UNION << 24 | 1, 4, name("i_nlink"), 1, 0],
            // 4: const of 5, 5: struct { sec, nsec }
            &[0, KIND_CONST << 24, 5],
            &[0, KIND_STRUCT << 24 | 2, 8, name("sec"), 1, 0, name("nsec"), 1, 32],
            // 6: enum ids
            &[name("ids"), KIND_ENUM << 24 | 2, 4, name("NONE"), 0, name("MODULE"), 2],
        ];
        file(&types.concat(), STRINGS)
    }

    #[test]
    fn members_and_enumerators_are_found() {
        let btf = Btf::parse(sample()).unwrap();
        assert_eq!(btf.member("inode", "i_ino"), Ok(0));
        assert_eq!(btf.member("inode", "i_nlink"), Ok(8));
        assert_eq!(btf.member("inode", "ts.nsec"), Ok(20));
        assert_eq!(btf.enumerator("ids", "MODULE"), Ok(2));
    }

    #[test]
    fn what_is_missing_is_named() {
        let btf = Btf::parse(sample()).unwrap();
        let text = |result: Result<u32, BtfError>| result.unwrap_err().to_string();
        assert_eq!(text(btf.member("file", "f_inode")), "the kernel has no struct file");
        assert_eq!(
            text(btf.member("inode", "i_size")),
            "the kernel's struct inode has no member i_size"
        );
        assert_eq!(
            text(btf.member("inode", "i_ino.x")),
            "the kernel's struct inode has no member i_ino.x"
        );
        assert_eq!(text(btf.member("inode", "flag")), "inode.flag is a bit field");
        assert_eq!(
            text(btf.enumerator("ids", "KEXEC")),
            "the kernel's enum ids has no KEXEC"
        );
        assert_eq!(text(btf.enumerator("no", "KEXEC")), "the kernel's enum no has no KEXEC");
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error_or_still_right() {
        let whole = sample();
        for length in 0..whole.len() {
            assert!(Btf::parse(whole[..length].to_vec()).is_err(), "cut at {length}");
        }
    }

    #[test]
    fn no_changed_byte_makes_the_reader_panic() {
        let whole = sample();
        for at in 0..whole.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut changed = whole.clone();
                changed[at] = value;
                if let Ok(btf) = Btf::parse(changed) {
                    let _ = btf.member("inode", "ts.nsec");
                    let _ = btf.member("inode", "i_nlink");
                    let _ = btf.enumerator("ids", "MODULE");
                }
            }
        }
    }

    #[test]
    fn a_structure_that_contains_itself_ends() {
        let strings = b"\0s\0";
        let types = [1, KIND_STRUCT << 24 | 1, 4, 0, 1, 0];
        let btf = Btf::parse(file(&types, strings)).unwrap();
        assert!(matches!(btf.member("s", "x"), Err(BtfError::NoMember { .. })));
    }

    #[test]
    fn unknown_kinds_are_named() {
        let error = Btf::parse(file(&[0, 20 << 24, 0], b"\0")).unwrap_err();
        assert_eq!(error, BtfError::UnknownKind { id: 1, kind: 20 });
    }
}
