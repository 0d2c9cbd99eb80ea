package httpboot

import (
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"krgimage/pxe/nodes"
)

// file serves one file, ranges included, and notes the stage when the last byte
// was written. The path is opened anew for every request: after a build it may
// lead to another image.
func (s *Server) file(path string, stage nodes.Stage) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		f, err := os.Open(path)
		if err == nil {
			defer f.Close()
		}
		info, statErr := os.FileInfo(nil), err
		if err == nil {
			info, statErr = f.Stat()
		}
		if statErr != nil || !info.Mode().IsRegular() {
			s.log.Error("boot file can't be served", "path", path, "err", statErr)
			http.Error(w, "the head node has no such boot file; see its log", http.StatusNotFound)
			return
		}
		http.NewResponseController(w).SetWriteDeadline(time.Now().Add(transferTimeout))
		w.Header().Set("Content-Type", "application/octet-stream")
		t := &transfer{ResponseWriter: w}
		http.ServeContent(t, r, "", info.ModTime(), f)
		if r.Method == http.MethodGet && t.complete(info.Size()) {
			if n, ok := s.cfg.Nodes.ByAddress(remote(r)); ok {
				s.cfg.Nodes.Saw(n.MAC, stage, "")
			}
		}
	}
}

// transfer watches how much of a file a response carries.
type transfer struct {
	http.ResponseWriter
	status  int
	written int64
}

func (t *transfer) Unwrap() http.ResponseWriter { return t.ResponseWriter }

func (t *transfer) WriteHeader(status int) {
	t.status = status
	t.ResponseWriter.WriteHeader(status)
}

func (t *transfer) Write(p []byte) (int, error) {
	n, err := t.ResponseWriter.Write(p)
	t.written += int64(n)
	return n, err
}

// ReadFrom keeps sendfile(2) possible.
func (t *transfer) ReadFrom(r io.Reader) (int64, error) {
	n, err := io.Copy(t.ResponseWriter, r)
	t.written += n
	return n, err
}

// complete says whether the response ended with the file's last byte: a whole
// file, or the last of the ranges in which a firmware fetches it.
func (t *transfer) complete(size int64) bool {
	switch t.status {
	case http.StatusOK:
		return t.written == size
	case http.StatusPartialContent:
		first, last, ok := contentRange(t.Header().Get("Content-Range"))
		return ok && last == size-1 && t.written == last-first+1
	}
	return false
}

// contentRange reads "bytes 0-99/100".
func contentRange(h string) (first, last int64, ok bool) {
	rest, ok := strings.CutPrefix(h, "bytes ")
	if !ok {
		return 0, 0, false
	}
	span, _, _ := strings.Cut(rest, "/")
	a, b, _ := strings.Cut(span, "-")
	first, errA := strconv.ParseInt(a, 10, 64)
	last, errB := strconv.ParseInt(b, 10, 64)
	return first, last, errA == nil && errB == nil
}
