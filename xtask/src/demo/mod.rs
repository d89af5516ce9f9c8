//! tmp
pub fn run() -> Result<(), crate::run::Error> {
    Ok(())
}
