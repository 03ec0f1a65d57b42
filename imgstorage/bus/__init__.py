"""The message bus: who may say what to whom (topology), and the RabbitMQ client that carries it (amqp, client)."""
