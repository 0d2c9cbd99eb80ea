package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"os"

	"golang.org/x/sys/unix"
)

// Client talks to the node's daemon. Make one with NewClient.
type Client struct {
	http *http.Client
}

// NewClient returns a client for the first of the sockets that exists: the
// host part's and the container's paths of it.
func NewClient(paths ...string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		err := os.ErrNotExist
		for _, p := range paths {
			var conn net.Conn
			if conn, err = (&net.Dialer{}).DialContext(ctx, "unix", p); err == nil || !errors.Is(err, os.ErrNotExist) {
				return conn, err
			}
		}
		return nil, err
	}
	return &Client{&http.Client{Transport: &http.Transport{DialContext: dial}}}
}

// Close gives up idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status asks for the cluster's status.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	resp, err := c.do(ctx, http.MethodGet, "/v1/cluster", nil)
	if err != nil {
		return s, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
		return s, fmt.Errorf("answer of the node daemon: %w", err)
	}
	return s, nil
}

// Watch yields the status now and at each change until ctx ends, then nothing
// more; an error is the last thing it yields.
func (c *Client) Watch(ctx context.Context) iter.Seq2[Status, error] {
	return func(yield func(Status, error) bool) {
		resp, err := c.do(ctx, http.MethodGet, "/v1/cluster/watch", nil)
		if err != nil {
			if ctx.Err() == nil {
				yield(Status{}, err)
			}
			return
		}
		defer resp.Body.Close()
		lines := bufio.NewReader(resp.Body)
		for {
			line, err := lines.ReadBytes('\n')
			var s Status
			if err == nil {
				err = json.Unmarshal(line, &s)
			}
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				if errors.Is(err, io.EOF) {
					err = Errorf(unix.ECONNRESET, "the node daemon has ended")
				}
				yield(Status{}, err)
				return
			}
			if !yield(s, nil) {
				return
			}
		}
	}
}

// Add is Backend.Add.
func (c *Client) Add(ctx context.Context, ids []int) error {
	return c.post(ctx, "/v1/nodes/add", idList{ids})
}

// Del is Backend.Del.
func (c *Client) Del(ctx context.Context, ids []int) error {
	return c.post(ctx, "/v1/nodes/del", idList{ids})
}

// Poweroff is Backend.Poweroff.
func (c *Client) Poweroff(ctx context.Context) error {
	return c.post(ctx, "/v1/cluster/poweroff", nil)
}

// Reboot is Backend.Reboot.
func (c *Client) Reboot(ctx context.Context) error {
	return c.post(ctx, "/v1/cluster/reboot", nil)
}

func (c *Client) post(ctx context.Context, path string, body any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	resp, err := c.do(ctx, http.MethodPost, path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// do sends a request. A daemon that isn't there is ENOSYS, as a system call of
// a kernel without Kerrighed.
func (c *Client) do(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://node"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	switch {
	case errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED):
		return nil, Errorf(unix.ENOSYS, "the node daemon doesn't run on this machine: %v", err)
	case err != nil:
		return nil, fmt.Errorf("reach the node daemon: %w", err)
	case resp.StatusCode == http.StatusOK:
		return resp, nil
	}
	defer resp.Body.Close()
	var e Error
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(&e); err != nil || e.Errno == "" {
		return nil, fmt.Errorf("the node daemon answers %s", resp.Status)
	}
	return nil, &e
}
