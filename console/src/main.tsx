import { render, type JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { call, Problem, session } from "./api";
import { href, useRoute, type Route } from "./hooks";
import { BatchPage, Batches } from "./pages/batches";
import { Gallery } from "./pages/gallery";
import { PipelinePage, Pipelines } from "./pages/pipelines";
import { Playground } from "./pages/playground";
import { PredictionPage } from "./pages/prediction";
import { RecipePage, Recipes } from "./pages/recipes";
import { Refusal, Title } from "./ui";
import "@picocss/pico/css/pico.min.css";
import "./style.css";

const PAGES: [string, string][] = [
  ["predictions", "Gallery"],
  ["run", "Run"],
  ["batches", "Batches"],
  ["pipelines", "Pipelines"],
  ["recipes", "Recipes"],
  ["trainings", "Trainings"],
];

function App(): JSX.Element {
  const route = useRoute();
  const [signedIn, setSignedIn] = useState(session.token !== null);
  const [at = "predictions"] = route.path;
  return (
    <>
      <a class="skip" href="#content" onClick={skip}>
        Skip to content
      </a>
      <header class="container">
        <nav aria-label="Pages">
          <ul>
            {signedIn &&
              PAGES.map(([path, name]) => (
                <li key={path}>
                  <a href={href([path])} {...(at === path ? { "aria-current": "page" as const } : {})}>
                    {name}
                  </a>
                </li>
              ))}
          </ul>
          {signedIn && (
            <ul>
              <li>
                <button
                  type="button"
                  class="secondary outline"
                  onClick={() => {
                    session.end();
                    setSignedIn(false);
                  }}
                >
                  Sign out
                </button>
              </li>
            </ul>
          )}
        </nav>
      </header>
      <main class="container" id="content" tabIndex={-1}>
        {signedIn ? <PageOf key={route.path.join("/") + route.query} route={route} /> : <SignIn done={() => setSignedIn(true)} />}
      </main>
    </>
  );
}

/** The fragment is the route: the link to the content must not change it. */
function skip(event: Event): void {
  event.preventDefault();
  document.getElementById("content")?.focus();
}

function PageOf({ route }: { route: Route }): JSX.Element {
  const [page = "predictions", id] = route.path;
  switch (page) {
    case "predictions":
    case "trainings":
      return id ? <PredictionPage kind={page} id={id} /> : <Gallery route={route} />;
    case "run":
      return <Playground route={route} />;
    case "batches":
      return id ? <BatchPage id={id} /> : <Batches />;
    case "pipelines":
      return id ? <PipelinePage id={id} /> : <Pipelines />;
    case "recipes":
      return id ? <RecipePage name={id} /> : <Recipes />;
    default:
      return (
        <>
          <Title>Not found</Title>
          <p>
            There is no such page. <a href={href([])}>Go to the gallery</a>.
          </p>
        </>
      );
  }
}

function SignIn({ done }: { done: () => void }): JSX.Element {
  const [token, setToken] = useState("");
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState<Problem | null>(null);
  useEffect(() => {
    document.title = "Sign in · Console";
  }, []);
  const enter = async (): Promise<void> => {
    setBusy(true);
    session.begin(token.trim());
    try {
      await call("/predictions");
      done();
    } catch (error) {
      // A token that may not read is one, too: its pages say what it may do.
      if (error instanceof Problem && error.status === 403) return done();
      session.end();
      setProblem(error instanceof Problem ? error : new Problem(0, String(error)));
    } finally {
      setBusy(false);
    }
  };
  return (
    <form
      class="sign-in"
      onSubmit={(event) => {
        event.preventDefault();
        void enter();
      }}
    >
      <h1>Sign in</h1>
      <label>
        Access token
        <input
          type="password"
          autoComplete="off"
          spellcheck={false}
          required
          value={token}
          onInput={(event) => setToken(event.currentTarget.value)}
        />
      </label>
      <small>
        Made with <code>replicate-serverless token create</code>. This tab forgets it when it is closed.
      </small>
      <button type="submit" aria-busy={busy} disabled={busy}>
        Sign in
      </button>
      <Refusal problem={problem} />
    </form>
  );
}

const root = document.getElementById("app");
if (root) render(<App />, root);
