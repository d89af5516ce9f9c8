//! The object with the probes of tier 3 keeps to what Linux 4.19 takes. There is no machine with so old a kernel among
//! the tests: the rules of its verifier that the object could break are checked one by one instead.

use std::collections::BTreeSet;
use std::path::Path;

use aya_obj::generated::bpf_insn;
use aya_obj::{Function, Object};

/// BPF_MAXINSNS; the million came with 5.2.
const MOST_INSTRUCTIONS: usize = 4096;

/// include/uapi/linux/bpf.h: map_lookup_elem, map_update_elem, probe_read, ktime_get_ns, get_current_pid_tgid, get_current_uid_gid,
/// get_current_comm, perf_event_output, get_current_task, probe_read_str; and get_current_cgroup_id, the newest, of 4.18.
const HELPERS: [i32; 11] = [1, 2, 4, 5, 14, 15, 16, 25, 35, 45, 80];

/// Hash, array, perf event array, per-CPU array, LRU hash: all of 4.10 or older.
const MAPS: [u32; 5] = [1, 2, 4, 6, 9];

const CLASS: u8 = 0x07;
const LDX: u8 = 0x01;
const STX: u8 = 0x03;
const JMP: u8 = 0x05;
const JMP32: u8 = 0x06;
const LD_IMM64: u8 = 0x18;
const MEM: u8 = 0x60;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const JA: u8 = 0x05;

fn object() -> Object {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/assay/assay-ebpf-probe.o");
    let bytes = std::fs::read(&path).expect("`cargo xtask` has built the object");
    Object::parse(&bytes).expect("an object with kernel programs")
}

/// Where an instruction may go on: to the next one, or where it jumps to.
fn ways(function: &Function, at: usize) -> Vec<usize> {
    let instruction = function.instructions[at];
    let target = || usize::try_from(at as i64 + 1 + i64::from(instruction.off)).expect("inside the program");
    match instruction.code {
        EXIT => vec![],
        JA => vec![target()],
        LD_IMM64 => vec![at + 2],
        code if code & CLASS == JMP && code != CALL => vec![at + 1, target()],
        _ => vec![at + 1],
    }
}

/// Whether a way leads back to where it was (DFS, as check_cfg() of the verifier).
fn has_a_loop(function: &Function) -> bool {
    let (mut open, mut done, mut stack) = (BTreeSet::new(), BTreeSet::new(), vec![(0, false)]);
    while let Some((at, left)) = stack.pop() {
        if left {
            open.remove(&at);
            done.insert(at);
        } else if open.contains(&at) {
            return true;
        } else if !done.contains(&at) {
            open.insert(at);
            stack.push((at, true));
            stack.extend(ways(function, at).into_iter().map(|next| (next, false)));
        }
    }
    false
}

fn check(name: &str, instruction: &bpf_insn, at: usize) {
    let class = instruction.code & CLASS;
    assert_ne!(class, JMP32, "{name} {at}: 32-bit jumps came with 5.1");
    if class == STX || class == LDX {
        let mode = instruction.code & 0xe0;
        assert_eq!(mode, MEM, "{name} {at}: neither atomics nor sign extension");
    }
    if instruction.code == CALL {
        assert_eq!(instruction.src_reg(), 0, "{name} {at}: a call to another function");
        assert!(
            HELPERS.contains(&instruction.imm),
            "{name} {at}: helper {} is newer, or new here",
            instruction.imm
        );
    }
}

#[test]
fn vm_tier3_object_keeps_to_what_linux_4_19_takes() {
    let object = object();
    for (name, map) in &object.maps {
        assert!(!name.starts_with('.'), "{name}: data of programs came with 5.2");
        assert!(MAPS.contains(&map.map_type()), "{name}: map type {}", map.map_type());
    }
    let mut programs = 0;
    for function in object.functions.values() {
        // The compiler's own, which nobody calls (checked below); the loader leaves them out.
        if ["memcpy", "memmove", "memset"].contains(&function.name.as_str()) {
            continue;
        }
        programs += 1;
        let length = function.instructions.len();
        assert!(length <= MOST_INSTRUCTIONS, "{}: {length} instructions", function.name);
        assert!(!has_a_loop(function), "{}: a loop", function.name);
        let mut at = 0;
        while at < length {
            let instruction = &function.instructions[at];
            check(&function.name, instruction, at);
            at += if instruction.code == LD_IMM64 { 2 } else { 1 };
        }
    }
    assert_eq!(programs, object.programs.len());
}

#[test]
fn vm_tier3_a_loop_would_be_found() {
    let object = object();
    let mut function = object
        .functions
        .values()
        .find(|f| f.name == "load_data")
        .expect("it")
        .clone();
    assert!(!has_a_loop(&function));
    // A jump from the end to the beginning.
    let last = function.instructions.len() - 1;
    function.instructions[last].code = JA;
    function.instructions[last].off = -i16::try_from(last + 1).expect("a short program");
    assert!(has_a_loop(&function));
}
