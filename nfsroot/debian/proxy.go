package debian

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"krgimage/nfsroot/debian/space"
)

// proxy is an HTTP proxy (RFC 9112 §3.2.2, absolute-form) on the loopback
// interface for the configured mirrors and nothing else. Immutable files come
// from and go to the cache; indexes pass through.
type proxy struct {
	cache   *cache
	mirrors []mirror
	client  *http.Client
	log     *slog.Logger
	url     string // http://127.0.0.1:PORT

	server *http.Server
	stop   context.CancelFunc
	group  *errgroup.Group

	bytes   atomic.Int64                  // from the mirrors since the start
	watcher atomic.Pointer[func(n int64)] // told the number of new bytes

	mu      sync.Mutex
	lastErr error // of a mirror or of the store; guarded by mu
}

const (
	// stallTimeout ends a transfer that brings no byte for so long.
	stallTimeout = 60 * time.Second
	// transferTries is how often one file's transfer is taken up again
	// after the connection broke in the middle.
	transferTries = 4
)

func startProxy(ctx context.Context, c *cache, mirrors []mirror, transport http.RoundTripper, log *slog.Logger) (*proxy, error) {
	if transport == nil {
		transport = &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           (&net.Dialer{Timeout: 20 * time.Second}).DialContext,
			ResponseHeaderTimeout: stallTimeout,
			TLSHandshakeTimeout:   20 * time.Second,
			IdleConnTimeout:       90 * time.Second,
			MaxIdleConnsPerHost:   8,
			DisableCompression:    true, // bytes pass as they are
		}
	}
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("package proxy: %w", err)
	}
	ctx, stop := context.WithCancel(ctx)
	group, ctx := errgroup.WithContext(ctx)
	p := &proxy{
		cache: c, mirrors: mirrors, log: log, stop: stop, group: group,
		client: &http.Client{Transport: transport},
		url:    "http://" + listener.Addr().String(),
	}
	p.server = &http.Server{
		Handler:           p,
		ReadHeaderTimeout: 30 * time.Second,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	group.Go(func() error {
		if err := p.server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		// Transfers end with ctx; what they have stored must be settled before
		// the cache's owner goes on.
		settle, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if err := p.server.Shutdown(settle); err != nil {
			return p.server.Close()
		}
		return nil
	})
	return p, nil
}

func (p *proxy) close() error {
	p.stop()
	return p.group.Wait()
}

// watch tells report about every byte that arrives, until the returned function
// is called.
func (p *proxy) watch(report func(total int64)) (end func()) {
	var total atomic.Int64
	f := func(n int64) { report(total.Add(n)) }
	p.watcher.Store(&f)
	return func() { p.watcher.Store(nil) }
}

func (p *proxy) count(n int) {
	p.bytes.Add(int64(n))
	if f := p.watcher.Load(); f != nil {
		(*f)(int64(n))
	}
}

// takeErr returns the last thing that went wrong upstream or on disk, and
// forgets it.
func (p *proxy) takeErr() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.lastErr
	p.lastErr = nil
	return err
}

func (p *proxy) setErr(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lastErr = err
}

// upstream finds the mirror that a request is for.
func (p *proxy) upstream(u *url.URL) (*url.URL, bool) {
	for _, m := range p.mirrors {
		if u.Scheme == "http" && u.Host == m.upstream.Host && strings.HasPrefix(u.Path, m.upstream.Path+"/") && !strings.Contains(u.Path, "/../") {
			up := *u
			up.Scheme, up.User = m.upstream.Scheme, m.upstream.User
			return &up, true
		}
	}
	return nil, false
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		http.Error(w, "only GET and HEAD are proxied", http.StatusMethodNotAllowed)
		return
	}
	up, ok := p.upstream(r.URL)
	if !ok {
		http.Error(w, "not one of the configured mirrors", http.StatusForbidden)
		return
	}
	if r.Method == http.MethodHead || !cacheable(up.Path) {
		p.pass(w, r, up)
		return
	}
	key, err := cacheKey(up.Host, up.Path)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	started := false
	file, err := p.fetch(r.Context(), key, up, func(total int64) io.Writer {
		started = true
		if total >= 0 {
			w.Header().Set("Content-Length", strconv.FormatInt(total, 10))
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		w.WriteHeader(http.StatusOK)
		return w
	})
	switch {
	case err != nil && started:
		panic(http.ErrAbortHandler) // the client must not take it for complete
	case err != nil:
		var status *statusError
		if errors.As(err, &status) {
			http.Error(w, err.Error(), status.code)
			return
		}
		http.Error(w, err.Error(), http.StatusBadGateway)
	case !started:
		http.ServeFile(w, r, file)
	}
}

// pass forwards a request and its answer unchanged.
func (p *proxy) pass(w http.ResponseWriter, r *http.Request, up *url.URL) {
	resp, err := p.get(r.Context(), r.Method, up, r.Header, "If-Modified-Since", "If-None-Match", "If-Range", "Range", "Cache-Control")
	if err != nil {
		p.setErr(err)
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	for _, name := range []string{"Content-Length", "Content-Type", "Content-Range", "Last-Modified", "Etag", "Date", "Accept-Ranges"} {
		if v := resp.Header.Get(name); v != "" {
			w.Header().Set(name, v)
		}
	}
	w.WriteHeader(resp.StatusCode)
	if _, err := io.Copy(&countWriter{w, p}, resp.Body); err != nil {
		p.setErr(&MirrorError{Mirror: up.Host, URL: up.Redacted(), Err: err})
		panic(http.ErrAbortHandler)
	}
}

// statusError is an answer other than 200 and 206.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string { return "it answered " + e.text }

// fetch brings a file into the cache and returns its path. When it has to come
// from the mirror, begin is called once with the size (-1: not known) as soon
// as the mirror answers, and gets the bytes as they come; begin may be nil.
func (p *proxy) fetch(ctx context.Context, key string, up *url.URL, begin func(total int64) io.Writer) (string, error) {
	unlock := p.cache.lock(key)
	defer unlock()
	if file, ok := p.cache.lookup(key); ok {
		return file, nil
	}
	err := p.transfer(ctx, key, up, begin)
	if err != nil {
		err = space.Explain(err, "packages are fetched", p.cache.dir, 0)
		if ctx.Err() == nil {
			p.setErr(err)
		}
		return "", err
	}
	return p.cache.file(key), nil
}

// transfer fills the part file, taking the transfer up again where it broke.
// The caller holds the key's lock.
func (p *proxy) transfer(ctx context.Context, key string, up *url.URL, begin func(total int64) io.Writer) error {
	part, err := p.cache.openPart(key)
	if err != nil {
		return err
	}
	defer part.close()
	var client *resumedWriter
	var last error
	for range transferTries {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		header := http.Header{}
		if part.have > 0 {
			header.Set("Range", fmt.Sprintf("bytes=%d-", part.have))
			header.Set("If-Range", part.etag)
		}
		resp, err := p.get(ctx, http.MethodGet, up, header, "Range", "If-Range")
		if err != nil {
			last = err
			continue
		}
		total, err := part.accept(resp)
		if err != nil {
			resp.Body.Close()
			var status *statusError
			if errors.As(err, &status) {
				return &MirrorError{Mirror: up.Host, URL: up.Redacted(), Err: err}
			}
			if errors.Is(err, errPartUseless) {
				last = err
				continue
			}
			return err
		}
		if client == nil {
			client = &resumedWriter{}
			if begin != nil {
				client.w = begin(total)
			}
			if err := client.catchUp(part); err != nil {
				resp.Body.Close()
				return err
			}
		}
		client.at = part.have
		broken, err := p.fill(part, client, resp.Body)
		resp.Body.Close()
		if err != nil {
			return err
		}
		if broken == nil && total >= 0 && part.have != total {
			broken = fmt.Errorf("%d of %d bytes came", part.have, total)
		}
		if broken == nil {
			return part.commit()
		}
		last = &MirrorError{Mirror: up.Host, URL: up.Redacted(), Err: fmt.Errorf("the transfer broke off: %w", broken)}
	}
	return last
}

// fill copies the body to the part and on to the client. A failure to read is
// returned apart from failures to write.
func (p *proxy) fill(part *part, client io.Writer, body io.Reader) (broken, err error) {
	buf := make([]byte, 128<<10)
	for {
		n, readErr := body.Read(buf)
		if n > 0 {
			if _, err := part.Write(buf[:n]); err != nil {
				return nil, err
			}
			p.count(n)
			if _, err := client.Write(buf[:n]); err != nil {
				return nil, fmt.Errorf("the client went away: %w", err)
			}
		}
		if readErr == io.EOF {
			return nil, nil
		}
		if readErr != nil {
			return readErr, nil
		}
	}
}

// errPartUseless is an interrupted download that the mirror will not continue.
var errPartUseless = errors.New("the mirror does not continue the interrupted download")

// accept makes the part ready for a response: continued on 206, from the start
// on 200. It returns the size of the whole file, -1 when not known.
func (p *part) accept(resp *http.Response) (total int64, err error) {
	switch resp.StatusCode {
	case http.StatusPartialContent:
		var first, last int64
		if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/%d", &first, &last, &total); err != nil || first != p.have {
			if err := p.restart(); err != nil {
				return 0, err
			}
			return 0, errPartUseless
		}
		return total, nil
	case http.StatusOK:
		if err := p.restart(); err != nil {
			return 0, err
		}
		p.etag = strongValidator(resp.Header)
		return resp.ContentLength, p.begin(p.etag)
	case http.StatusRequestedRangeNotSatisfiable:
		if err := p.restart(); err != nil {
			return 0, err
		}
		return 0, errPartUseless
	}
	return 0, &statusError{resp.StatusCode, resp.Status}
}

// strongValidator is what If-Range may carry (RFC 9110 §13.1.5).
func strongValidator(h http.Header) string {
	if tag := h.Get("Etag"); tag != "" && !strings.HasPrefix(tag, "W/") {
		return tag
	}
	return h.Get("Last-Modified")
}

// resumedWriter passes a byte stream on that may be taken up again from an
// earlier place: bytes that were sent before are not sent twice.
type resumedWriter struct {
	w    io.Writer // nil: nobody listens
	sent int64
	at   int64 // offset of the next Write in the file
}

// catchUp sends what the part holds from an earlier session.
func (r *resumedWriter) catchUp(part *part) error {
	if r.w == nil || part.have == 0 {
		r.sent = part.have
		return nil
	}
	n, err := io.Copy(r.w, io.NewSectionReader(part.f, 0, part.have))
	r.sent = n
	return err
}

func (r *resumedWriter) Write(b []byte) (int, error) {
	start := r.at
	r.at += int64(len(b))
	if r.w == nil || r.at <= r.sent {
		return len(b), nil
	}
	fresh := b[max(0, r.sent-start):]
	n, err := r.w.Write(fresh)
	r.sent += int64(n)
	return len(b), err
}

// get asks a mirror. The body ends with an error when it stalls.
func (p *proxy) get(ctx context.Context, method string, up *url.URL, header http.Header, keep ...string) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	req, err := http.NewRequestWithContext(ctx, method, up.String(), nil)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	req.Header.Set("User-Agent", "krgimage")
	for _, name := range keep {
		if v := header.Get(name); v != "" {
			req.Header.Set(name, v)
		}
	}
	resp, err := p.client.Do(req)
	if err != nil {
		cancel(nil)
		var urlErr *url.Error
		if errors.As(err, &urlErr) {
			err = urlErr.Err
		}
		return nil, &MirrorError{Mirror: up.Host, URL: up.Redacted(), Err: err}
	}
	body := &stallReader{body: resp.Body, cancel: cancel}
	body.timer = time.AfterFunc(stallTimeout, func() { cancel(errStalled) })
	body.cause = func() error { return context.Cause(ctx) }
	resp.Body = body
	return resp, nil
}

var errStalled = fmt.Errorf("no byte came for %v", stallTimeout)

// stallReader cancels a request whose body stalls.
type stallReader struct {
	body   io.ReadCloser
	timer  *time.Timer
	cancel context.CancelCauseFunc
	cause  func() error
}

func (s *stallReader) Read(b []byte) (int, error) {
	n, err := s.body.Read(b)
	s.timer.Reset(stallTimeout)
	if err != nil && err != io.EOF {
		err = cmp.Or(s.cause(), err)
	}
	return n, err
}

func (s *stallReader) Close() error {
	s.timer.Stop()
	err := s.body.Close()
	s.cancel(nil)
	return err
}

type countWriter struct {
	w io.Writer
	p *proxy
}

func (c *countWriter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.p.count(n)
	return n, err
}

// MirrorError is a mirror that could not be reached or did not have what was
// asked.
type MirrorError struct {
	Mirror string // host
	URL    string
	Err    error
}

func (e *MirrorError) Error() string {
	hint := "is the network up, and debian.mirror right in cluster.yaml? A proxy is taken from the environment variables http_proxy and https_proxy"
	var status *statusError
	if errors.As(e.Err, &status) {
		hint = "check debian.mirror, debian.security_mirror and debian.suite in cluster.yaml"
	}
	return fmt.Sprintf("mirror %s: %s: %v\n  fix: %s", e.Mirror, e.URL, e.Err, hint)
}

func (e *MirrorError) Unwrap() error { return e.Err }
