//! The routes, in one table, and what answers them.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, on};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::answer::{answer, json_response};
use super::body;
use super::chat::{self, Conversation};
use super::completions;
use super::config::ServerConfig;
use super::driver::{Handle, Phase};
use super::engine::Frontend;
use super::error::ApiError;
use super::fields::Fields;
use super::guard::guard;
use super::metrics::Metrics;
use super::plan::{Plan, check_model, no_model};
use super::record::Record;

/// One of the server's routes.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// `GET` (and `HEAD` with it) or `POST`.
    pub method: &'static str,
    /// With `{*name}` for the rest of a path.
    pub path: &'static str,
    /// Whether it answers without a key.
    pub open: bool,
    endpoint: Endpoint,
}

#[derive(Debug, Clone, Copy)]
enum Endpoint {
    Health,
    Metrics,
    Models,
    Model,
    Chat,
    Completions,
    Tokenize,
    Detokenize,
}

impl Route {
    const fn new(method: &'static str, path: &'static str, endpoint: Endpoint) -> Self {
        Self { method, path, open: matches!(endpoint, Endpoint::Health), endpoint }
    }
}

/// All routes. The router is made from this table.
pub const ROUTES: [Route; 8] = [
    Route::new("GET", "/health", Endpoint::Health),
    Route::new("GET", "/metrics", Endpoint::Metrics),
    Route::new("GET", "/v1/models", Endpoint::Models),
    // A model's name may have slashes.
    Route::new("GET", "/v1/models/{*model}", Endpoint::Model),
    Route::new("POST", "/v1/chat/completions", Endpoint::Chat),
    Route::new("POST", "/v1/completions", Endpoint::Completions),
    Route::new("POST", "/tokenize", Endpoint::Tokenize),
    Route::new("POST", "/detokenize", Endpoint::Detokenize),
];

/// What all connections share.
pub(super) struct App {
    pub config: ServerConfig,
    pub frontend: Arc<dyn Frontend>,
    pub handle: Handle,
    pub metrics: Arc<Metrics>,
    /// `system_fingerprint` of replies: model and version of this crate.
    pub fingerprint: String,
    created: u64,
    /// Requests that are being read and encoded, at most one for each core; who has gone counts until the work is done.
    planners: Arc<Semaphore>,
}

impl App {
    pub fn new(config: ServerConfig, frontend: Arc<dyn Frontend>, handle: Handle) -> Self {
        let version = env!("CARGO_PKG_VERSION");
        let hash = blake3::hash(format!("{version} {}", frontend.card().id).as_bytes()).to_hex();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            config,
            frontend,
            handle,
            metrics: Arc::default(),
            fingerprint: format!("fp_{}", &hash[..12]),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()),
            planners: Arc::new(Semaphore::new(cores)),
        }
    }

    /// Runs what may take a while on a long body (parsing, templates, encoding) beside the connections' threads.
    async fn aside<T: Send + 'static>(
        self: &Arc<Self>,
        body: Bytes,
        work: impl FnOnce(&[u8], &Self) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let failed = || ApiError::internal("the server failed on this request");
        let one = self.planners.clone().acquire_owned().await.map_err(|_| failed())?;
        let app = self.clone();
        let done = tokio::task::spawn_blocking(move || {
            let _one = one;
            work(&body, &app)
        });
        done.await.map_err(|_| failed())?
    }
}

/// The router, made from [`ROUTES`].
pub(super) fn router(app: Arc<App>) -> Router {
    let mut router = Router::new();
    for route in ROUTES {
        let filter = if route.method == "GET" { MethodFilter::GET } else { MethodFilter::POST };
        let handler = move |State(app): State<Arc<App>>, request: Request| async move {
            endpoint(route.endpoint, app, request).await.unwrap_or_else(ApiError::into_response)
        };
        router = router.route(route.path, on(filter, handler));
    }
    router
        .fallback(async |request: Request| {
            let path: String = request.uri().path().chars().take(80).collect();
            ApiError::new(StatusCode::NOT_FOUND, format!("there is no route {path}"))
                .with_code("unknown_route")
        })
        .method_not_allowed_fallback(async |request: Request| {
            let message = format!("{} is not allowed here", request.method());
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).with_code("method_not_allowed")
        })
        .layer(from_fn_with_state(app.clone(), guard))
        .with_state(app)
}

async fn endpoint(endpoint: Endpoint, app: Arc<App>, request: Request) -> Result<Response, ApiError> {
    match endpoint {
        Endpoint::Health => Ok(health(&app.handle.phase())),
        Endpoint::Metrics => {
            let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
            Ok((kind, app.metrics.page(&app.handle.stats())).into_response())
        }
        Endpoint::Models => Ok(json_response(&json!({"object": "list", "data": [model(&app)]}))),
        Endpoint::Model => {
            let name = request.uri().path().strip_prefix("/v1/models/").unwrap_or_default();
            let card = app.frontend.card();
            match decoded(name) {
                Some(name) if name == card.id => Ok(json_response(&model(&app))),
                other => Err(no_model(other.as_deref().unwrap_or(name), card)),
            }
        }
        Endpoint::Chat => generate(app, request, chat::plan).await,
        Endpoint::Completions => generate(app, request, completions::plan).await,
        Endpoint::Tokenize => {
            let body = body::read(request, &app.config).await?;
            Ok(json_response(&app.aside(body, tokenize).await?))
        }
        Endpoint::Detokenize => {
            let body = body::read(request, &app.config).await?;
            Ok(json_response(&app.aside(body, detokenize).await?))
        }
    }
}

fn health(phase: &Phase) -> Response {
    let (status, word) = match phase {
        Phase::Ready => (StatusCode::OK, "ok"),
        Phase::Loading => (StatusCode::SERVICE_UNAVAILABLE, "loading"),
        Phase::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        Phase::Stopped => (StatusCode::SERVICE_UNAVAILABLE, "stopped"),
        Phase::Dead(_) => (StatusCode::SERVICE_UNAVAILABLE, "dead"),
    };
    (status, json_response(&json!({"status": word}))).into_response()
}

fn model(app: &App) -> Value {
    let card = app.frontend.card();
    json!({
        "id": card.id, "object": "model", "created": app.created, "owned_by": card.owner,
        "max_model_len": card.context,
    })
}

/// A path's percent escapes resolved; `None` where they are wrong.
fn decoded(path: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first == b'%' {
            let (hex, after) = rest.split_at_checked(2)?;
            if !hex.iter().all(u8::is_ascii_hexdigit) {
                return None; // `from_str_radix` takes a sign, too.
            }
            bytes.push(u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()?);
            rest = after;
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).ok()
}

async fn generate(
    app: Arc<App>,
    request: Request,
    plan: fn(&[u8], &ServerConfig, &dyn Frontend) -> Result<Plan, ApiError>,
) -> Result<Response, ApiError> {
    let record = request.extensions().get::<Record>().cloned();
    let record = record.ok_or_else(|| ApiError::internal("the request has no record"))?;
    let body = body::read(request, &app.config).await?;
    let plan = app.aside(body, move |body, app| plan(body, &app.config, &*app.frontend)).await?;
    answer(app, plan, record).await
}

/// `{prompt, add_special_tokens}` or the messages of a chat, to token ids.
fn tokenize(body: &[u8], app: &App) -> Result<Value, ApiError> {
    let mut fields = Fields::parse(body)?;
    let (frontend, card) = (&*app.frontend, app.frontend.card());
    check_model(&mut fields, card)?;
    let special = fields.boolean("add_special_tokens")?.unwrap_or(true);
    let ids = match fields.string("prompt")? {
        Some(text) if special => frontend.text(&text),
        Some(text) => frontend.tokenizer().encode(&text, false).map_err(Into::into),
        None => Ok(Conversation::take(&mut fields)
            .map_err(|e| if e.param.as_deref() == Some("messages") { prompt_or_messages(e) } else { e })?
            .ids(frontend)?),
    };
    let ids = ids.map_err(|e| ApiError::refused("prompt", &e))?;
    Ok(json!({"count": ids.len(), "max_model_len": card.context, "tokens": ids}))
}

fn prompt_or_messages(error: ApiError) -> ApiError {
    ApiError { message: format!("{}, and there is no prompt", error.message), ..error }
}

/// `{tokens}` to text, special tokens as they are written.
fn detokenize(body: &[u8], app: &App) -> Result<Value, ApiError> {
    let mut fields = Fields::parse(body)?;
    let card = app.frontend.card();
    check_model(&mut fields, card)?;
    let list = fields.list("tokens")?.ok_or_else(|| ApiError::field("tokens", "tokens is missing"))?;
    let ids = completions::ids("tokens", &list)?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= card.vocab) {
        let message = format!("token {id} is outside the vocabulary of {}", card.vocab);
        return Err(ApiError::field("tokens", message));
    }
    let text =
        app.frontend.tokenizer().decode(&ids, false).map_err(|e| ApiError::field("tokens", e.to_string()))?;
    Ok(json!({"prompt": text}))
}

#[cfg(test)]
mod tests {
    use super::decoded;

    #[test]
    fn escapes_of_a_path_are_resolved() {
        assert_eq!(decoded("org%2Fa%20b/c").as_deref(), Some("org/a b/c"));
        for bad in ["%", "%2", "%zz", "%ff", "%+f"] {
            assert_eq!(decoded(bad), None, "{bad}");
        }
    }
}
