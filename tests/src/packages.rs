//! Where the tests of the packages find them.

/// Names the folder with the packages.
pub const FOLDER_VARIABLE: &str = "ASSAY_PACKAGES";
/// Names the folder with the same, made once more.
pub const AGAIN_VARIABLE: &str = "ASSAY_PACKAGES_AGAIN";
/// Names the archive with the root filesystem of Debian 13.
pub const DEBIAN13_VARIABLE: &str = "ASSAY_DEBIAN13";
