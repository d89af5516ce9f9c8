//! Policies by name, as the JSON that `assay-evidence` defines.

use assay_evidence::policy::{Policy, PolicyError};
use rusqlite::{OptionalExtension, params};

use super::{Store, StoreError, sql, valid_name};
use crate::time::now;

impl Store {
    /// The policy of this name, if there is one.
    pub fn policy(&self, name: &str) -> Result<Option<Policy>, StoreError> {
        let text = self.read("read a policy", |c| {
            c.query_row("SELECT json FROM policies WHERE name = ?1", [name], |row| {
                row.get::<_, String>(0)
            })
            .optional()
        })?;
        text.map(|text| parse(name, &text)).transpose()
    }

    /// What changes whenever the policy does; `None`: there is none of this name.
    pub fn policy_version(&self, name: &str) -> Result<Option<i64>, StoreError> {
        self.read("read a policy", |c| {
            c.query_row("SELECT updated FROM policies WHERE name = ?1", [name], |row| row.get(0))
                .optional()
        })
    }

    /// Names and times of last change (Unix) of all policies.
    pub fn policies(&self) -> Result<Vec<(String, i64)>, StoreError> {
        self.read("list the policies", |c| {
            let mut statement = c.prepare_cached("SELECT name, updated FROM policies ORDER BY name")?;
            statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        })
    }

    /// Stores a policy under a name; whether it may replace one is the caller's decision. `false` if there is one and it
    /// may not.
    pub fn put_policy(&self, name: &str, policy: &Policy, replace: bool) -> Result<bool, StoreError> {
        valid_name(name)?;
        let json = policy.to_json();
        let conflict = if replace {
            "DO UPDATE SET json = ?2, updated = max(?3, updated + 1)"
        } else {
            "DO NOTHING"
        };
        let statement =
            format!("INSERT INTO policies (name, json, updated) VALUES (?1, ?2, ?3) ON CONFLICT (name) {conflict}");
        Ok(self.read("store a policy", |c| c.execute(&statement, params![name, json, now()]))? == 1)
    }

    /// Changes a policy in one transaction, so that two operators do not lose each other's line.
    pub fn edit_policy(
        &self,
        name: &str,
        edit: impl FnOnce(&mut Policy) -> Result<(), PolicyError>,
    ) -> Result<(), StoreError> {
        self.transaction("change a policy", |t| {
            let failed = sql("change a policy");
            let text: Option<String> = t
                .query_row("SELECT json FROM policies WHERE name = ?1", [name], |row| row.get(0))
                .optional()
                .map_err(&failed)?;
            let mut policy = parse(name, &text.ok_or_else(|| StoreError::NoSuchPolicy(name.to_owned()))?)?;
            edit(&mut policy).map_err(|e| StoreError::Policy(name.to_owned(), e))?;
            let json = policy.to_json();
            t.execute(
                "UPDATE policies SET json = ?2, updated = max(?3, updated + 1) WHERE name = ?1",
                params![name, json, now()],
            )
            .map_err(&failed)?;
            Ok(())
        })
    }
}

fn parse(name: &str, text: &str) -> Result<Policy, StoreError> {
    Policy::from_json(text.as_bytes()).map_err(|e| StoreError::Policy(name.to_owned(), e))
}
