// Package wire is the protocol between nodes and head, made from wire.proto by
// `make generate`.
package wire

//go:generate sh -c "go build -o ../../../bin/protoc-gen-go google.golang.org/protobuf/cmd/protoc-gen-go && go build -o ../../../bin/protoc-gen-go-grpc google.golang.org/grpc/cmd/protoc-gen-go-grpc && PATH=../../../bin:$PATH protoc --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative wire.proto"
