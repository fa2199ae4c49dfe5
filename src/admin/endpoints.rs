//! Every endpoint of the admin listener, in one table.
//!
//! What is answered, the list in a 404, the `allow` of a 405 and the test that compares `docs/openapi.yaml` with what
//! is there all come from it.

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Dashboard,
    Metrics,
    Livez,
    Readyz,
    Status,
    Choices,
    Requests,
    LastReload,
    Reload,
    Upgrade,
    Drain,
    Undrain,
    Weight,
    Explain,
    Config,
    Log,
    SetLog,
    OpenApi,
}

/// One of the endpoints.
pub(super) struct Endpoint {
    /// In upper case; whoever may `GET` may `HEAD`.
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    pub(super) ask: Ask,
    /// For everybody, without the token.
    pub(super) open: bool,
}

const fn get(path: &'static str, ask: Ask) -> Endpoint {
    Endpoint { method: "GET", path, ask, open: false }
}

const fn post(path: &'static str, ask: Ask) -> Endpoint {
    Endpoint { method: "POST", path, ask, open: false }
}

const fn open(path: &'static str, ask: Ask) -> Endpoint {
    Endpoint { open: true, ..get(path, ask) }
}

/// All of them.
pub(super) const ENDPOINTS: [Endpoint; 19] = [
    open("/", Ask::Dashboard),
    open("/dashboard", Ask::Dashboard),
    get("/metrics", Ask::Metrics),
    open("/livez", Ask::Livez),
    open("/readyz", Ask::Readyz),
    get("/status", Ask::Status),
    get("/choices", Ask::Choices),
    get("/requests", Ask::Requests),
    get("/reload", Ask::LastReload),
    post("/reload", Ask::Reload),
    post("/upgrade", Ask::Upgrade),
    post("/drain", Ask::Drain),
    post("/undrain", Ask::Undrain),
    post("/weight", Ask::Weight),
    post("/explain", Ask::Explain),
    get("/config", Ask::Config),
    get("/log", Ask::Log),
    Endpoint { method: "PUT", ..get("/log", Ask::SetLog) },
    get("/openapi.yaml", Ask::OpenApi),
];

/// Why there is no such endpoint.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unknown {
    Path,
    /// These methods there are.
    Method(String),
}

/// The endpoint for a request.
pub(super) fn find(method: &str, path: &str) -> Result<&'static Endpoint, Unknown> {
    let method = if method == "HEAD" { "GET" } else { method };
    let here = || ENDPOINTS.iter().filter(|endpoint| endpoint.path == path);
    if let Some(found) = here().find(|endpoint| endpoint.method == method) {
        return Ok(found);
    }
    let methods: Vec<_> = here().map(|endpoint| endpoint.method).collect();
    match &methods[..] {
        [] => Err(Unknown::Path),
        methods if methods.contains(&"GET") => Err(Unknown::Method(format!("{}, HEAD", methods.join(", ")))),
        methods => Err(Unknown::Method(methods.join(", "))),
    }
}

/// Whether there is something for everybody at `path`.
pub(super) fn is_open(path: &str) -> bool {
    ENDPOINTS.iter().any(|endpoint| endpoint.open && endpoint.path == path)
}

/// The list for whoever asked for something else.
pub(super) fn list() -> String {
    ENDPOINTS.iter().fold("there is\n".to_owned(), |list, Endpoint { method, path, .. }| {
        list + &format!("  {method} {path}\n")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_found_by_method_and_path_and_what_is_not_there_is_told_apart() {
        assert_eq!(find("GET", "/status").unwrap().ask, Ask::Status);
        assert_eq!(find("HEAD", "/status").unwrap().ask, Ask::Status);
        assert_eq!(find("POST", "/reload").unwrap().ask, Ask::Reload);
        let unknown = |method, path| find(method, path).err().unwrap();
        assert_eq!(unknown("GET", "/status/"), Unknown::Path);
        assert_eq!(unknown("POST", "/status"), Unknown::Method("GET, HEAD".to_owned()));
        assert_eq!(unknown("DELETE", "/reload"), Unknown::Method("GET, POST, HEAD".to_owned()));
        for (at, endpoint) in ENDPOINTS.iter().enumerate() {
            let same = |other: &&Endpoint| other.path == endpoint.path && other.method == endpoint.method;
            assert_eq!(ENDPOINTS.iter().position(|other| same(&other)), Some(at), "{}", endpoint.path);
        }
    }
}
